"""Action experts: (noisy actions, noise level, `Prefix`) in, one output per action entry out. Adding one is a file here
and its names in the lines below."""

from typing import Annotated, Any

from pydantic import Field

from .dit import DiTExpert, DiTExpertConfig
from .gemma import GemmaExpert, GemmaExpertConfig
from .mlp import MLPExpert, MLPExpertConfig
from .smolvla import SmolVLAExpert, SmolVLAExpertConfig
from .unet import UNetExpert, UNetExpertConfig

ExpertConfig = Annotated[
    GemmaExpertConfig | SmolVLAExpertConfig | DiTExpertConfig | UNetExpertConfig | MLPExpertConfig,
    Field(discriminator="type"),
]
EXPERTS: dict[type, Any] = {
    GemmaExpertConfig: GemmaExpert,
    SmolVLAExpertConfig: SmolVLAExpert,
    DiTExpertConfig: DiTExpert,
    UNetExpertConfig: UNetExpert,
    MLPExpertConfig: MLPExpert,
}
"""A config's class -> the `Expert` that is built from it."""
