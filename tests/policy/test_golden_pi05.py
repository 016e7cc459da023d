"""Backbone, expert and objective against outputs that the reference code computed (a tiny random π0.5)."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from vlatune.data.batch import Observation, Prompts
from vlatune.policy.backbones.paligemma import PaliGemma, PaliGemmaConfig
from vlatune.policy.backbones.siglip import SiglipConfig
from vlatune.policy.experts.gemma import BoundGemmaExpert, GemmaExpert, GemmaExpertConfig
from vlatune.policy.layers.decoder import DecoderConfig
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.objective import Draw

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pi05"
RENAMED = {  # the reference's names -> ours; its vocabulary heads have no use here
    "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.": "backbone.vision_tower.",
    "model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear.": "backbone.multi_modal_projector.",
    "model.paligemma_with_expert.paligemma.model.language_model.": "backbone.language_model.",
    "model.paligemma_with_expert.gemma_expert.model.": "expert.",
    "model.": "expert.",
}


def renamed(name: str) -> str:
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise KeyError(name)


@pytest.fixture(scope="module")
def model_and_io():
    sizes = json.loads((GOLDEN / "sizes.json").read_text())
    vision = sizes["vision"]
    backbone = PaliGemma(
        PaliGemmaConfig(
            vision=SiglipConfig(
                image_px=vision["image_size"],
                patch_px=vision["patch_size"],
                width=vision["hidden_size"],
                mlp_dim=vision["intermediate_size"],
                depth=vision["num_hidden_layers"],
                num_heads=vision["num_attention_heads"],
            ),
            text=DecoderConfig(**sizes["vlm"]),
        ),
        vocab_size=sizes["vocab"],
        encoder_width=None,
        state_dim=32,
        cameras=("image0", "image1"),
        reads="kv",
    )
    expert = GemmaExpert(
        GemmaExpertConfig(gemma=DecoderConfig(**sizes["expert"])), prefix=backbone.shape, horizon=10, action_dim=32
    )
    model = torch.nn.ModuleDict({"backbone": backbone, "expert": expert})
    weights = {
        renamed(name): tensor
        for name, tensor in load_file(GOLDEN / "model.safetensors").items()
        if not name.endswith("lm_head.weight")
    }
    model.load_state_dict(weights)  # strict: every tensor used, none random
    io = load_file(GOLDEN / "io.safetensors")
    cameras = ("image0", "image1")
    observation = Observation(
        images={camera: io[camera].permute(0, 2, 3, 1)[:, None] for camera in cameras},
        image_mask={camera: io[f"image_mask{camera[-1]}"][:, None] for camera in cameras},
        state_BTS=io["state"][:, None],
        prompts=Prompts(ids_BL=io["tokens"], mask_BL=io["token_mask"]),
    )
    with torch.no_grad():
        bound = expert.bind(backbone(observation, observation.state_BTS))
        yield bound, io


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_loss(model_and_io):
    bound, io = model_and_io
    draw = Draw(noise_BHA=io["noise"], noise_level_B=io["time"])
    loss = Flow().loss(bound, io["actions"], torch.ones_like(io["actions"], dtype=torch.bool), draw)
    assert relative_error(loss.entries_BHA, io["loss"]) < 1e-5


@pytest.mark.parametrize("num_steps", [1, 10])
def test_samples(model_and_io, num_steps):
    bound, io = model_and_io
    sample = Flow(num_sampling_steps=num_steps).sample(bound, io["noise"])
    assert relative_error(sample, io[f"sample{num_steps}"]) < 1e-5


def test_the_comparison_can_fail(model_and_io):
    bound, io = model_and_io
    flipped = Flow(num_sampling_steps=10).sample(lambda x, level: bound(x, 1 - level), io["noise"])
    assert relative_error(flipped, io["sample10"]) > 1e-2
    everything_seen = BoundGemmaExpert(bound.expert, torch.ones_like(bound.mask_BP), bound.layers_kv)
    assert relative_error(Flow().sample(everything_seen, io["noise"]), io["sample10"]) > 1e-2
