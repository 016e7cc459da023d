"""How far an episode came, from true simulator states: what its failure is called."""

from typing import Any

import numpy as np

NEAR_M = 0.06
"""The gripper's site within this of an object's centre has reached it."""
LIFTED_M = 0.03
"""An object this far above its start was picked up."""


class Progress:
    """Watches one episode of a LIBERO problem."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self.reset()

    def reset(self) -> None:
        domain = self._domain
        self._movable = list(domain.objects_dict)
        wanted = [name for name in domain.obj_of_interest if name in domain.objects_dict]
        self._wanted = wanted[:1]
        """LIBERO lists what is moved first, where it goes after; none where only a fixture is worked (a drawer)."""
        self._fixtures = [name for name in domain.obj_of_interest if name in domain.fixtures_dict]
        self._start_z = {name: self._position(name)[2] for name in self._movable}
        self._reached = self._lifted = self._lifted_other = self._succeeded = False
        self._held = False

    def update(self) -> None:
        """After each control step."""
        domain = self._domain
        eef = domain.sim.data.site_xpos[domain.robots[0].eef_site_id]
        for name in self._wanted or self._fixtures:
            self._reached |= bool(np.linalg.norm(self._position(name) - eef) < NEAR_M)
        for name in self._movable:
            lifted = bool(self._position(name)[2] - self._start_z[name] > LIFTED_M)
            if name in self._wanted:
                self._lifted |= lifted
                self._held = lifted
            else:
                self._lifted_other |= lifted
        self._succeeded = bool(domain._check_success())

    def failure_mode(self) -> str:
        """Empty after success, else the first that holds of `dropped`, `wrong_object`, `missed_grasp`, `never_reached`;
        `timeout` where the object is still held, or where a fixture was reached and not worked."""
        if self._succeeded:
            return ""
        if self._lifted:
            return "timeout" if self._held else "dropped"
        if self._lifted_other:
            return "wrong_object"
        if not self._reached and (self._wanted or self._fixtures):
            return "never_reached"
        return "missed_grasp" if self._wanted else "timeout"

    def _position(self, name: str) -> np.ndarray:
        position: np.ndarray = self._domain.sim.data.body_xpos[self._domain.obj_body_id[name]]
        return position.copy()
