"""Runs, as functions. A recipe's docstring states hardware, time and the number it must reach; the command line changes
its values: `vlatune train pocket --num-steps 500`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.named import named
from ..policy.backbones.paligemma import PaliGemmaConfig
from ..policy.backbones.siglip import SiglipConfig
from ..policy.config import PolicyConfig
from ..policy.experts.gemma import GemmaExpertConfig
from ..policy.layers.decoder import DecoderConfig
from ..policy.lora import LoraConfig
from ..policy.objectives.flow import Flow
from ..policy.objectives.rs_imle import RSIMLE
from .config import AdamWConfig, Stage, TrainConfig
from .public_recipes import PUBLIC_RECIPES


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


def tiny_stages() -> TrainConfig:
    """For tests: two steps of the expert by flow matching, then two of adapters on the backbone and the expert by RS-IMLE."""
    return replace(
        tiny(),
        out=Path("runs/tiny_stages"),
        trained="expert",
        num_steps=2,
        then=(
            Stage(
                num_steps=2,
                trained="lora+expert",
                lora=LoraConfig(rank=2, dropout=0.0),
                optimizer=AdamWConfig(learning_rate=5e-4, num_warmup_steps=1),
                objective=RSIMLE(num_candidates=3),
            ),
        ),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (pocket, libero, *PUBLIC_RECIPES, tiny, tiny_stages)
}


def load_recipe(name: str) -> TrainConfig:
    """The recipe called `name`; ValueError with the nearest names if there is none."""
    return named("recipe", name, RECIPES)()
