"""What a model's weights are called elsewhere and here: tables of prefixes, read in both directions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Renaming:
    """Names by their prefix. Of several that fit the first counts, so an older spelling stands below the present one."""

    prefixes: tuple[tuple[str, str], ...]
    """(elsewhere, here)."""
    dropped: tuple[str, ...] = ()
    """Prefixes of weights elsewhere that nothing reads: vocabulary heads, statistics that live in files of their own."""

    def ours(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights under our names, and the names that are in no row of the table."""
        renamed, unknown = {}, []
        for name, tensor in weights.items():
            if name.startswith(self.dropped):
                continue
            here = _replaced(name, self.prefixes)
            if here is None:
                unknown.append(name)
            else:
                renamed[here] = tensor
        return renamed, unknown

    def theirs(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under the present names elsewhere. Raises KeyError for a name that is in no row of the table."""
        back = tuple((here, there) for there, here in self.prefixes)
        renamed = {}
        for name, tensor in weights.items():
            there = _replaced(name, back)
            if there is None:
                raise KeyError(name)
            renamed[there] = tensor
        return renamed


def _replaced(name: str, prefixes: tuple[tuple[str, str], ...]) -> str | None:
    fitting: Iterator[str] = (new + name.removeprefix(old) for old, new in prefixes if name.startswith(old))
    return next(fitting, None)


_PALIGEMMA = "paligemma_with_expert.paligemma.model."
_GEMMA_EXPERT = "paligemma_with_expert.gemma_expert.model."
_SMOLVLM = "vlm_with_expert.vlm.model."
_HEADS = ("paligemma_with_expert.paligemma.lm_head.", "paligemma_with_expert.gemma_expert.lm_head.")
_ACTION_LAYERS = tuple(
    (f"{layer}.", f"expert.{layer}.")
    for layer in (
        "action_in_proj",
        "action_out_proj",
        "time_mlp_in",
        "time_mlp_out",
        "action_time_mlp_in",
        "action_time_mlp_out",
    )
)
OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
"""Where LeRobot kept statistics before it had processor files."""

PI = Renaming(
    prefixes=(
        (f"{_PALIGEMMA}vision_tower.vision_model.", "backbone.vision_tower."),
        (f"{_PALIGEMMA}vision_tower.", "backbone.vision_tower."),
        (f"{_PALIGEMMA}multi_modal_projector.linear.", "backbone.multi_modal_projector."),
        (f"{_PALIGEMMA}language_model.", "backbone.language_model."),
        (f"{_GEMMA_EXPERT}layers.", "expert.layers."),
        (f"{_GEMMA_EXPERT}norm.", "expert.norm."),
        ("state_proj.", "expert.state_proj."),
        *_ACTION_LAYERS,
    ),
    dropped=(*_HEADS, *OLD_STATISTICS),
)
"""π0 and π0.5, in LeRobot's and in openpi's converted checkpoints."""

SMOLVLA = Renaming(
    prefixes=(
        (f"{_SMOLVLM}vision_model.", "backbone.vision_tower."),
        (f"{_SMOLVLM}connector.modality_projection.proj.", "backbone.connector."),
        (f"{_SMOLVLM}text_model.", "backbone.language_model."),
        ("vlm_with_expert.lm_expert.layers.", "expert.layers."),
        ("vlm_with_expert.lm_expert.norm.", "expert.norm."),
        ("state_proj.", "backbone.state_proj."),
        *_ACTION_LAYERS,
    ),
    dropped=("vlm_with_expert.vlm.lm_head.", *OLD_STATISTICS),
)
"""SmolVLA, in LeRobot's checkpoints."""

RDT = Renaming(
    prefixes=(
        ("lang_adaptor.", "expert.lang_adaptor."),
        ("img_adaptor.", "expert.img_adaptor."),
        ("state_adaptor.", "expert.state_adaptor."),
        ("model.", "expert."),
    )
)
"""RDT-1B, in its authors' checkpoints; these hold no encoders."""

UNET = Renaming(prefixes=(("", "expert.unet."),))
"""diffusion_policy's ConditionalUnet1D alone."""

PALIGEMMA = Renaming(
    prefixes=(
        ("model.vision_tower.vision_model.", "backbone.vision_tower."),
        ("model.vision_tower.", "backbone.vision_tower."),
        ("model.multi_modal_projector.linear.", "backbone.multi_modal_projector."),
        ("model.language_model.", "backbone.language_model."),
        ("vision_tower.vision_model.", "backbone.vision_tower."),
        ("vision_tower.", "backbone.vision_tower."),
        ("multi_modal_projector.linear.", "backbone.multi_modal_projector."),
        ("language_model.model.", "backbone.language_model."),
    ),
    dropped=("lm_head.", "language_model.lm_head."),
)
"""Plain PaliGemma, in its files' present and original spelling."""

SMOLVLM = Renaming(
    prefixes=(
        ("model.vision_model.", "backbone.vision_tower."),
        ("model.connector.modality_projection.proj.", "backbone.connector."),
        ("model.text_model.", "backbone.language_model."),
    ),
    dropped=("lm_head.",),
)
"""Plain SmolVLM."""

SIGLIP = Renaming(
    prefixes=(("vision_model.", "backbone.vision_tower."), ("", "backbone.vision_tower.")),
    dropped=("text_model.", "logit_scale", "logit_bias", "vision_model.head.", "head."),
)
"""Plain SigLIP: its vision tower; the pooling head has no reader."""

CLIP = Renaming(
    prefixes=(
        ("vision_model.", "backbone.vision_tower.vision_model."),
        ("visual_projection.", "backbone.vision_tower.visual_projection."),
        ("text_model.", "backbone.text_tower.text_model."),
        ("text_projection.", "backbone.text_tower.text_projection."),
    ),
    dropped=("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)
"""Plain CLIP: both towers and their projections."""
