"""An artificial inference delay: a decision made from one observation is there some control steps later, as on a real robot.

What the robot does meanwhile is the question. It can hold still: then it loses these steps at every chunk. Or it goes on with the chunk
that it has: then the new chunk begins with steps that are over when it comes, made from an observation that has aged.
"""

from dataclasses import dataclass
from typing import Literal

WhileWaiting = Literal["hold", "previous"]


@dataclass(frozen=True, kw_only=True)
class InferenceDelay:
    """How late decisions are, and what the robot does until they are there."""

    num_steps: int = 0
    """Control steps from the observation that a decision is made from until its first action can be carried out."""
    while_waiting: WhileWaiting = "hold"
    """`hold`: stand still; `previous`: go on with the chunk before. For its first decision a robot can but stand still."""

    def check(self, num_executed: int, horizon: int) -> None:
        """Raises `ValueError` for a delay that chunks of `horizon` steps, of which `num_executed` lie between two decisions, do not bridge."""
        if self.while_waiting == "hold":
            return
        if self.num_steps > num_executed:
            raise ValueError(
                f"--inference-delay {self.num_steps}: with {num_executed} executed steps the next decision is due before this one is there; "
                f"type {num_executed} or less, or --while-waiting hold"
            )
        if num_executed + self.num_steps > horizon:
            raise ValueError(
                f"--inference-delay {self.num_steps}: the policy's chunks have {horizon} steps, and {num_executed} are executed between two "
                f"decisions; going on with the previous chunk needs {num_executed + self.num_steps}: type {horizon - num_executed} or less"
            )

    @property
    def num_over(self) -> int:
        """How many steps of the chunk before are carried out while a decision is awaited."""
        return self.num_steps if self.while_waiting == "previous" else 0

    def is_decision(self, step: int, num_executed: int) -> bool:
        """Whether a decision is made from the observation at this control step."""
        if self.while_waiting == "hold":
            return step % (num_executed + self.num_steps) == 0
        return step == 0 or (step > self.num_steps and (step - self.num_steps) % num_executed == 0)

    def stands_still(self, step: int, num_executed: int) -> bool:
        """Whether the robot stands still at this control step, waiting."""
        if self.while_waiting == "hold":
            return step % (num_executed + self.num_steps) < self.num_steps
        return step < self.num_steps
