"""What a robot carries out in an episode: chunks as they come, late ones late, and standing still where there is none."""

import numpy as np

from ..data.robots.card import RobotCard
from .delay import InferenceDelay
from .temporal_ensemble import TemporalEnsemble


class ChunkQueue:
    """Of one episode. Plans count the steps in which the robot moves: where it stands still, waiting, they stand still with it."""

    def __init__(
        self,
        robot: RobotCard,
        *,
        num_executed: int,
        delay: InferenceDelay,
        temporal_ensemble: float | None = None,
    ) -> None:
        """`num_executed` steps of a plan lie between two decisions."""
        self._robot = robot
        self._num_executed = num_executed
        self._delay = delay
        self._ensemble = None if temporal_ensemble is None else TemporalEnsemble(temporal_ensemble)
        self.taken: list[np.ndarray] = []
        """What the robot was given, step by step."""
        self._num_moved = 0
        self._chunk_HA: np.ndarray | None = None
        self._begins = 0
        self._awaited_HA: np.ndarray | None = None
        self._awaited_begins = self._arrives = 0
        self._stands_still = False
        self._seams: list[int] = []

    def await_chunk(self, chunk_HA: np.ndarray) -> None:
        """A decision made from the observation of this step, to be carried out when its delay is over; its first action is for this
        step of the plan. Raises `ValueError` if it has too few actions."""
        needed = self._num_executed + self._delay.num_over
        if len(chunk_HA) < needed:
            raise ValueError(f"the actor decided on {len(chunk_HA)} actions, and {needed} are to be executed")
        self._take_up_what_is_there()
        self._awaited_HA, self._awaited_begins = chunk_HA, self._num_moved
        self._arrives = len(self.taken) + self._delay.num_steps

    def wanted(self) -> np.ndarray:
        """(A,) for this step, not yet clipped to the robot's limits."""
        self._take_up_what_is_there()
        stood_still = self._stands_still
        self._stands_still = self._delay.stands_still(len(self.taken), self._num_executed)
        if self._stands_still:
            if not stood_still and self.taken:
                self._seams.append(len(self.taken))
            return self._still()
        if self._ensemble is not None:
            return self._ensemble.action(self._num_moved)
        assert self._chunk_HA is not None  # the first one comes when the first standing still ends
        action_A: np.ndarray = self._chunk_HA[self._num_moved - self._begins]
        return action_A

    def took(self, action_A: np.ndarray) -> None:
        """This step is over; `action_A` was what the robot was given."""
        self.taken.append(action_A)
        self._num_moved += not self._stands_still

    @property
    def seam_jump(self) -> float:
        """Mean L2 norm of the difference of successive actions, gripper left out, where what is carried out changes: from one chunk to
        the next, to standing still, or from that to a chunk. 0 where it never does."""
        if not self._seams:
            return 0.0
        jumps_CA = np.stack([self.taken[step] - self.taken[step - 1] for step in self._seams])
        return float(np.linalg.norm(np.delete(jumps_CA, self._robot.gripper_action, axis=1), axis=1).mean())

    def _take_up_what_is_there(self) -> None:
        if self._awaited_HA is None or len(self.taken) < self._arrives:
            return
        if self._chunk_HA is not None:
            self._seams.append(len(self.taken))
        self._chunk_HA, self._begins, self._awaited_HA = self._awaited_HA, self._awaited_begins, None
        if self._ensemble is not None:
            self._ensemble.add(self._begins, self._chunk_HA)

    def _still(self) -> np.ndarray:
        """(A,): no motion, the gripper as the action before had it (as the card has it if there was none)."""
        action_A = np.array(self._robot.still_action)
        if self.taken:
            action_A[self._robot.gripper_action] = self.taken[-1][self._robot.gripper_action]
        return action_A
