"""Action experts: (noisy actions, noise level, `Prefix`) in, one output per action entry out. Adding one is a file here
and its names in the two lines below."""

from .gemma import GemmaExpert, GemmaExpertConfig

ExpertConfig = GemmaExpertConfig
EXPERTS = {GemmaExpertConfig: GemmaExpert}
