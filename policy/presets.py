"""The public policies as configs: `full` as published, `tiny` for tests, with every part of the full one.

A preset fixes sizes, conventions and objective; robot, cameras and statistics come from the data."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..data.unified_vector import codec_named
from ..data.vector_layout import VectorLayout
from .backbones.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from .backbones.paligemma import PaliGemmaConfig
from .backbones.siglip import SiglipConfig
from .backbones.siglip_t5 import SiglipT5Config
from .backbones.smolvlm import SmolVLMConfig
from .config import PolicyConfig
from .experts.dit import DiTExpertConfig
from .experts.gemma import GemmaExpertConfig
from .experts.mlp import MLPExpertConfig
from .experts.smolvla import SmolVLAExpertConfig
from .experts.unet import UNetExpertConfig
from .layers.decoder import DecoderConfig
from .objectives.diffusion import Diffusion
from .objectives.flow import Flow

PADDED_32 = VectorLayout(name="padded", width=32)
"""π0, π0.5 and SmolVLA: a robot's numbers first, then zeros."""

_HEADS: dict[str, Any] = {"depth": 3, "num_heads": 4, "num_kv_heads": 1, "head_dim": 8}
_LLAMA_HEADS: dict[str, Any] = {"depth": 4, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "family": "llama"}
_TINY_VISION = SiglipConfig(image_px=28, patch_px=7, width=32, mlp_dim=48, depth=2, num_heads=2)


def pi05(*, tiny: bool = False) -> PolicyConfig:
    """π0.5 (Physical Intelligence 2025): PaliGemma-2B, a 300 M expert with adaptive norms, the state in the prompt's words.

    openpi's LIBERO checkpoint has no state: prompt="newline"."""
    return PolicyConfig(
        backbone=_tiny_paligemma() if tiny else PaliGemmaConfig(vocab_size=257_152),
        expert=_tiny_gemma_expert() if tiny else GemmaExpertConfig(),
        objective=Flow(),
        horizon=4 if tiny else 50,
        prompt="pi05",
        state_layout=PADDED_32,
        action_layout=PADDED_32,
    )


def pi0(*, tiny: bool = False) -> PolicyConfig:
    """π0 (Black et al. 2024): as π0.5, with the state as a token and the noise level mixed into the action tokens."""
    base = pi05(tiny=tiny)
    assert isinstance(base.expert, GemmaExpertConfig)
    return replace(
        base,
        expert=replace(base.expert, noise_level="action_token", state="token"),
        prompt="newline",
        state_normalisation="mean_std",
        action_normalisation="mean_std",
    )


def smolvla(*, tiny: bool = False) -> PolicyConfig:
    """SmolVLA (Shukor et al. 2025): 16 layers of SmolVLM2-500M, an expert of three quarters of its width."""
    text = DecoderConfig(width=48, mlp_dim=96, **_LLAMA_HEADS)
    vision = replace(_TINY_VISION, image_px=32, patch_px=8)
    return PolicyConfig(
        backbone=SmolVLMConfig(vision=vision, scale_factor=2, text=text, vocab_size=None) if tiny else SmolVLMConfig(),
        expert=SmolVLAExpertConfig(decoder=replace(text, width=36, mlp_dim=64)) if tiny else SmolVLAExpertConfig(),
        objective=Flow(),
        horizon=4 if tiny else 50,
        prompt="newline",
        state_normalisation="mean_std",
        action_normalisation="mean_std",
        state_layout=PADDED_32,
        action_layout=PADDED_32,
    )


def rdt(*, tiny: bool = False, codec: str = "libero_osc") -> PolicyConfig:
    """RDT-1B (Liu et al. 2024): two observations, cached T5-XXL text, a 28-block diffusion transformer on a unified vector.

    `codec` names how LIBERO's Panda is written into that vector (data/unified_vector.py), and so the robot card of the cache. The
    default is the one that was reported to work; another robot has layouts of its own."""
    vector = codec_named(codec)
    dit = DiTExpertConfig(width=32, depth=4, num_heads=4, num_image_tokens=96, num_language_tokens=32)
    return PolicyConfig(
        backbone=SiglipT5Config(vision=_TINY_VISION) if tiny else SiglipT5Config(),
        expert=dit if tiny else DiTExpertConfig(),
        objective=Diffusion(),
        horizon=4 if tiny else 64,
        state_normalisation="identity",
        action_normalisation="identity",
        state_layout=vector.state,
        action_layout=vector.actions,
        observation_offsets=(-1, 0),
    )


def clip_flow(*, tiny: bool = False) -> PolicyConfig:
    """Frozen CLIP ViT-B/16 and about 4 M trained parameters of MLPs, rectified flow: the small baseline."""
    return PolicyConfig(
        backbone=_tiny_clip() if tiny else ClipConfig(),
        expert=MLPExpertConfig(),
        objective=Flow(noise_levels="uniform"),
        horizon=4 if tiny else 16,
    )


def clip_unet(*, tiny: bool = False) -> PolicyConfig:
    """Frozen CLIP's patches and text tokens, pooled by attention over typed tokens, and a 1-D U-Net (Chi et al. 2023)."""
    backbone = replace(_tiny_clip() if tiny else ClipConfig(), features="patches")
    base = clip_flow(tiny=tiny)
    unet = UNetExpertConfig()
    pooling = replace(unet.pooling, kind="typed_attention")
    small = replace(unet, pooling=replace(pooling, width=32, num_heads=2), down_dims=(16, 32), step_embed_dim=16)
    return replace(base, backbone=backbone, expert=small if tiny else replace(unet, pooling=pooling))


PRESETS: dict[str, Callable[..., PolicyConfig]] = {
    preset.__name__: preset for preset in (pi0, pi05, smolvla, rdt, clip_flow, clip_unet)
}


def _tiny_paligemma() -> PaliGemmaConfig:
    return PaliGemmaConfig(vision=_TINY_VISION, text=DecoderConfig(width=48, mlp_dim=96, **_HEADS))


def _tiny_gemma_expert() -> GemmaExpertConfig:
    return GemmaExpertConfig(gemma=DecoderConfig(width=32, mlp_dim=64, **_HEADS))


def _tiny_clip() -> ClipConfig:
    return ClipConfig(
        vision=ClipVisionConfig(image_px=28, patch_px=7, width=32, mlp_dim=48, depth=2, num_heads=2),
        text=ClipTextConfig(width=32, mlp_dim=48, depth=2, num_heads=2),
        embedding_width=24,
    )
