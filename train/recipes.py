"""Runs, as functions. A recipe's docstring states hardware, time and the number it must reach; the command line changes
its values: `vlatune train pocket --num-steps 500`."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..policy import presets
from ..policy.backbones.paligemma import PaliGemmaConfig
from ..policy.backbones.siglip import SiglipConfig
from ..policy.config import PolicyConfig
from ..policy.experts.gemma import GemmaExpertConfig
from ..policy.layers.decoder import DecoderConfig
from ..policy.objectives.flow import Flow
from .config import AdamWConfig, TrainConfig


def pocket() -> TrainConfig:
    """The quickstart's: a 1 M-parameter policy from random weights on the pocket benchmark, two CPU cores.

    About ten minutes; must succeed in 80 % of the reported episodes or more after `vlatune collect --episodes 75 --noise 0.3`."""
    heads: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 32, "depth": 3}
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/pocket"),
        policy=PolicyConfig(
            backbone=PaliGemmaConfig(
                vision=SiglipConfig(
                    image_px=64, patch_px=16, width=128, mlp_dim=256, depth=1, num_heads=4, stem="conv"
                ),
                text=DecoderConfig(width=128, mlp_dim=256, **heads),
                state="token",
                camera_embedding=True,
            ),
            expert=GemmaExpertConfig(gemma=DecoderConfig(width=96, mlp_dim=192, **heads)),
            objective=Flow(num_draws=4),
            horizon=16,
        ),
        optimizer=AdamWConfig(learning_rate=1e-3, num_warmup_steps=100, betas=(0.9, 0.99), weight_decay=1e-3),
        num_steps=2400,
        batch_size=64,
        checkpoint_every=600,
        validate_every=300,
        log_every=20,
    )


def libero() -> TrainConfig:
    """A 70 M-parameter policy from random weights on one LIBERO suite at 128 pixels; one GPU or more.

    Not yet measured on a GPU: the row in BENCHMARKS.md is open."""
    heads: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "depth": 8}
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/libero"),
        policy=PolicyConfig(
            backbone=PaliGemmaConfig(
                vision=SiglipConfig(
                    image_px=128, patch_px=16, width=512, mlp_dim=2048, depth=6, num_heads=8, stem="conv"
                ),
                text=DecoderConfig(width=512, mlp_dim=2048, **heads),
                state="token",
                camera_embedding=True,
            ),
            expert=GemmaExpertConfig(gemma=DecoderConfig(width=384, mlp_dim=1536, **heads)),
            objective=Flow(num_draws=4),
            horizon=16,
        ),
        optimizer=AdamWConfig(learning_rate=3e-4, num_warmup_steps=500, betas=(0.9, 0.95), weight_decay=1e-2),
        num_steps=40_000,
        batch_size=256,
        checkpoint_every=5000,
    )


def pi05() -> TrainConfig:
    """π0.5 on LIBERO as openpi trains it: all of its 3.35 B parameters, batch 256, chunks of 10. Eight GPUs of 80 GB.

    Cache: --tokenizer google/paligemma-3b-pt-224 --encoder none --image-px 224. Not yet measured here."""
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/pi05"),
        policy=replace(presets.pi05(), horizon=10),
        pretrained=("lerobot/pi05_base",),
        optimizer=AdamWConfig(
            learning_rate=5e-5, final_learning_rate=5e-5, num_warmup_steps=10_000, weight_decay=1e-10
        ),
        num_steps=30_000,
        batch_size=256,
    )


def pi0() -> TrainConfig:
    """π0 on LIBERO: all of its 3.24 B parameters, batch 32, chunks of 50. Eight GPUs of 80 GB.

    Cache as for pi05. Not yet measured here."""
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/pi0"),
        policy=presets.pi0(),
        pretrained=("lerobot/pi0_base",),
        optimizer=AdamWConfig(
            learning_rate=2.5e-5, final_learning_rate=2.5e-6, num_warmup_steps=1000, weight_decay=1e-10
        ),
        num_steps=30_000,
        batch_size=32,
    )


def smolvla() -> TrainConfig:
    """SmolVLA, all of its 403 M parameters, batch 64, chunks of 50. One GPU.

    Cache: --tokenizer HuggingFaceTB/SmolVLM2-500M-Video-Instruct --encoder none --image-px 512 --padding left_top --resize
    torch_bilinear. Not yet measured here."""
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/smolvla"),
        policy=presets.smolvla(),
        pretrained=("lerobot/smolvla_base",),
        optimizer=AdamWConfig(
            learning_rate=1e-4, final_learning_rate=2.5e-6, weight_decay=1e-10, gradient_clip_norm=10.0
        ),
        num_steps=30_000,
        batch_size=64,
    )


def rdt() -> TrainConfig:
    """RDT-1B's 1.23 B parameters behind a frozen SigLIP, batch 256, chunks of 64. Eight GPUs of 80 GB.

    Cache: --tokenizer google/t5-v1_1-xxl --encoder google/t5-v1_1-xxl --image-px 384 --background 127 127 127 --resize
    pil_bicubic. Not yet measured here."""
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/rdt"),
        policy=presets.rdt(),
        pretrained=("robotics-diffusion-transformer/rdt-1b", "google/siglip-so400m-patch14-384"),
        optimizer=AdamWConfig(
            learning_rate=1e-4, final_learning_rate=1e-4, num_warmup_steps=500, betas=(0.9, 0.999), weight_decay=1e-2
        ),
        num_steps=200_000,
        batch_size=256,
    )


def tiny() -> TrainConfig:
    """For tests: seconds on one core, learns nothing worth having."""
    heads: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "depth": 2}
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/tiny"),
        policy=PolicyConfig(
            backbone=PaliGemmaConfig(
                vision=SiglipConfig(image_px=16, patch_px=8, width=16, mlp_dim=32, depth=1, num_heads=2, stem="conv"),
                text=DecoderConfig(width=16, mlp_dim=32, **heads),
                state="token",
                camera_embedding=True,
            ),
            expert=GemmaExpertConfig(gemma=DecoderConfig(width=16, mlp_dim=32, **heads)),
            objective=Flow(num_draws=2, num_sampling_steps=2),
            horizon=4,
        ),
        optimizer=AdamWConfig(learning_rate=1e-3, num_warmup_steps=2),
        num_steps=4,
        batch_size=4,
        checkpoint_every=2,
        validate_every=2,
        num_validation_batches=1,
        log_every=1,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (pocket, libero, pi05, pi0, smolvla, rdt, tiny)
}


def load_recipe(name: str) -> TrainConfig:
    """The recipe called `name`; ValueError with the nearest names if there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no recipe {name!r}; {hint}There are: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
