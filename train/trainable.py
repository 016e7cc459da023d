"""Which parameters a run trains."""

from dataclasses import replace
from typing import Literal

from ..policy.lora import LoraConfig, add_adapters
from ..policy.policy import Policy

Trained = Literal["full", "vision_frozen", "expert", "lora", "lora+expert"]


def set_trained(policy: Policy, trained: Trained, lora: LoraConfig) -> None:
    """Freeze, and adapt, before the optimizer is made. What the policy itself keeps frozen stays frozen.

    Raises ValueError where nothing is left to train, or the LoRA scopes find nothing."""
    match trained:
        case "full":
            pass
        case "vision_frozen":
            towers = [module for name, module in policy.backbone.named_children() if name.endswith("_tower")]
            for tower in towers:
                tower.requires_grad_(False)
        case "expert":
            policy.backbone.requires_grad_(False)
        case "lora":
            add_adapters(policy, lora)
        case "lora+expert":
            trained_before = [p for p in policy.expert.parameters() if p.requires_grad]
            add_adapters(policy, replace(lora, expert="none"))
            for parameter in trained_before:
                parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            f"trained is {trained!r}, and this policy has nothing left to train; choose 'full' or 'expert'"
        )
