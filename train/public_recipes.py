"""Recipes for the public policies: what each trains, on what cache, and what it must reach."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..data.condition_dropout import ConditionsConfig
from ..policy import presets
from ..policy.experts.mlp import MLPExpertConfig
from ..policy.experts.pooling import PoolingKind
from ..policy.experts.unet import UNetExpertConfig
from ..policy.lora import LoraConfig
from ..policy.objectives import ObjectiveConfig
from ..policy.objectives.diffusion import Diffusion
from ..policy.objectives.flow import Flow
from ..policy.objectives.one_step import OneStep
from ..policy.objectives.regression import Regression
from ..policy.objectives.rs_imle import RSIMLE
from .config import ActivationCheckpointingConfig, AdamWConfig, Stage, TrainConfig
from .ema import EmaConfig


def pi05() -> TrainConfig:
    """π0.5 on LIBERO as openpi trains it: all of its 3.35 B parameters, batch 256, chunks of 10. Eight GPUs of 80 GB, by `vlatune plan`'s
    estimate with 15 GB to spare; half of the language model's blocks are computed twice for that.

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
        ema=EmaConfig(decay=0.999),
        activation_checkpointing=ActivationCheckpointingConfig(parts=("language_model",), every=2),
    )


def pi05_rs_imle() -> TrainConfig:
    """π0.5 turned into a one-step policy by RS-IMLE: 6,000 steps of the expert, then 6,000 with LoRA (rank 32) on the VLM as well.

    The chunk is read as x - v(x, 1), so that training starts at the flow expert's own one-step answer. Cache as for pi05. Not yet
    measured here; the one published run of this kind reported 70 % less latency."""
    objective = RSIMLE(output="aligned", distance="squared")
    optimizer = AdamWConfig(learning_rate=5e-5, final_learning_rate=5e-6, num_warmup_steps=500, weight_decay=1e-10)
    joint = Stage(
        num_steps=6000, trained="lora+expert", lora=LoraConfig(backbone="attention+mlp", rank=32), optimizer=optimizer
    )
    return replace(
        pi05(),
        out=Path("runs/pi05_rs_imle"),
        policy=replace(pi05().policy, objective=objective),
        trained="expert",
        optimizer=optimizer,
        num_steps=6000,
        then=(joint,),
        batch_size=64,
        ema=EmaConfig(),
    )


def pi05_one_step() -> TrainConfig:
    """π0.5 fine-tuned to act in one step: the noise level is drawn at pure noise. Cache as for pi05. Not yet measured here."""
    return replace(pi05(), out=Path("runs/pi05_one_step"), policy=replace(pi05().policy, objective=OneStep()))


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


def smolvla_flow() -> TrainConfig:
    """SmolVLA's expert alone by flow matching, 1e-4, batch 64: with smolvla_l1 and smolvla_ddpm the comparison of objectives on a
    pretrained backbone. One GPU. Cache as for smolvla. Not yet measured here."""
    return _smolvla_expert("smolvla_flow", Flow())


def smolvla_l1() -> TrainConfig:
    """As smolvla_flow, by L1; the chunk is read as x - v(x, 1), aligned with the pretrained flow expert."""
    return _smolvla_expert("smolvla_l1", Regression(output="aligned"))


def smolvla_ddpm() -> TrainConfig:
    """As smolvla_flow, by DDPM."""
    return _smolvla_expert("smolvla_ddpm", Diffusion())


def _smolvla_expert(name: str, objective: ObjectiveConfig) -> TrainConfig:
    return replace(
        smolvla(),
        out=Path("runs") / name,
        policy=replace(presets.smolvla(), objective=objective),
        trained="expert",
        optimizer=AdamWConfig(
            learning_rate=1e-4,
            final_learning_rate=2.5e-6,
            num_warmup_steps=1000,
            weight_decay=1e-10,
            gradient_clip_norm=10.0,
        ),
    )


def rdt() -> TrainConfig:
    """RDT-1B's 1.23 B parameters behind a frozen SigLIP, batch 256, chunks of 64. Eight GPUs of 80 GB.

    As its authors train it, each condition is hidden from a tenth of the samples, the state has noise of 40 dB, and the average's warm-up
    has power 0.75; none of their changes to pictures is made (their magnitudes: `RDT` in data/augment.py).
    Cache: --robot libero_panda_joints_fingers --tokenizer google/t5-v1_1-xxl --encoder google/t5-v1_1-xxl --image-px 384
    --background 127 127 127 --resize pil_bicubic. Not yet measured here."""
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/rdt"),
        policy=presets.rdt(),
        conditions=ConditionsConfig(dropout=0.1, state_noise_db=40.0),
        pretrained=("robotics-diffusion-transformer/rdt-1b", "google/siglip-so400m-patch14-384"),
        optimizer=AdamWConfig(
            learning_rate=1e-4, final_learning_rate=1e-4, num_warmup_steps=500, betas=(0.9, 0.999), weight_decay=1e-2
        ),
        num_steps=200_000,
        batch_size=256,
        ema=EmaConfig(decay=0.9999, power=0.75),
        activation_checkpointing=ActivationCheckpointingConfig(parts=("expert",)),
    )


def rdt_lora() -> TrainConfig:
    """RDT-1B by LoRA on its attention (rank 16; `--lora.rank 8` and 32 are the other two that were reported). One GPU of 80 GB.

    Conditions, noise, average and cache as for rdt. Not yet measured here; a saturation near 20 % was reported where full fine-tuning
    reached 76 to 94 %."""
    return replace(
        rdt(),
        out=Path("runs/rdt_lora"),
        trained="lora",
        lora=LoraConfig(backbone="none", expert="attention", rank=16),
        num_steps=50_000,
        batch_size=32,
    )


def rdt_physical() -> TrainConfig:
    """As rdt, with LIBERO written into RDT's vector in the units of its pre-training (data/unified_vector.py).

    Cache as for rdt, but --robot libero_panda. Not yet measured here."""
    return replace(rdt(), out=Path("runs/rdt_physical"), policy=presets.rdt(codec="libero_physical"))


def clip_flow() -> TrainConfig:
    """The small baseline on LIBERO-Spatial: frozen CLIP, 4 M trained parameters, rectified flow. One GPU, or a patient CPU.

    Cache: --tokenizer openai/clip-vit-base-patch16 --encoder none --image-px 224 --resize pil_bicubic. Not yet measured here."""
    return TrainConfig(
        cache=Path("cache"),
        out=Path("runs/clip_flow"),
        policy=presets.clip_flow(),
        pretrained=("openai/clip-vit-base-patch16",),
        optimizer=AdamWConfig(learning_rate=3e-4, num_warmup_steps=500, weight_decay=1e-4),
        num_steps=50_000,
        batch_size=64,
    )


def clip_flow_overfit() -> TrainConfig:
    """The small baseline on 512 moments of one task's demonstrations: must reach a loss under 0.01 and an `action_mse` under 0.001 on them.

    Cache as for clip_flow, of one file; `vlatune features` first makes it a matter of minutes on a CPU. Two things make it learn by heart
    quickly (LOG.md): CLIP's embeddings are standardised, and the expert predicts the action that the velocity is made of. Noise
    levels are shifted towards noise, where it shows whether the policy knows the action."""
    recipe = clip_flow()
    expert = recipe.policy.expert
    assert isinstance(expert, MLPExpertConfig)
    policy = replace(
        recipe.policy,
        expert=replace(expert, fusion=replace(expert.fusion, standardise=True)),
        objective=Flow(prediction="sample", noise_levels="uniform", level_shift=4.0, num_draws=4),
    )
    return replace(
        recipe,
        out=Path("runs/clip_flow_overfit"),
        policy=policy,
        optimizer=AdamWConfig(learning_rate=2e-3, num_warmup_steps=200, weight_decay=0.0),
        num_steps=6_000,
        checkpoint_every=2000,
        validate_every=500,
        log_every=100,
        overfit_batches=8,
    )


def unet_average() -> TrainConfig:
    """A 1-D U-Net over frozen CLIP's averaged tokens; on LIBERO-Spatial, or on all 40 tasks with a cache of them. One GPU. Cache as for
    clip_flow. Not yet measured here."""
    return _unet("average")


def unet_attention() -> TrainConfig:
    """As unet_average, the tokens pooled by attention."""
    return _unet("attention")


def unet_typed_attention() -> TrainConfig:
    """As unet_average, the tokens pooled by attention that knows image, language and state apart."""
    return _unet("typed_attention")


def _unet(pooling: PoolingKind) -> TrainConfig:
    policy = presets.clip_unet()
    assert isinstance(policy.expert, UNetExpertConfig)
    expert = replace(policy.expert, pooling=replace(policy.expert.pooling, kind=pooling))
    optimizer = AdamWConfig(learning_rate=1e-4, num_warmup_steps=500, betas=(0.95, 0.999), weight_decay=1e-6)
    return replace(
        clip_flow(),
        out=Path(f"runs/unet_{pooling}"),
        policy=replace(policy, expert=expert),
        optimizer=optimizer,
        ema=EmaConfig(decay=0.9999, power=0.75),
    )


PUBLIC_RECIPES: tuple[Callable[[], TrainConfig], ...] = (
    pi05,
    pi05_rs_imle,
    pi05_one_step,
    pi0,
    smolvla,
    smolvla_flow,
    smolvla_l1,
    smolvla_ddpm,
    rdt,
    rdt_physical,
    rdt_lora,
    clip_flow,
    clip_flow_overfit,
    unet_average,
    unet_attention,
    unet_typed_attention,
)
