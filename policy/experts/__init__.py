"""Action experts: (noisy actions, noise level, `Prefix`) in, one output per action entry out. Adding one is a file here
and its names in the two lines below."""

from typing import Any

from .gemma import GemmaExpert, GemmaExpertConfig

ExpertConfig = GemmaExpertConfig
EXPERTS: dict[type, Any] = {GemmaExpertConfig: GemmaExpert}
"""A config's class -> the `Expert` that is built from it."""
