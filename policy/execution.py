"""How a policy is run when it acts; imports nothing heavy, so that a command's --help is there at once."""

from typing import Literal

Compile = Literal["off", "on", "auto"]
"""auto: on a GPU, if it can be, or else not, saying why; not on a CPU, where compiling takes minutes that seldom come back."""
Precision = Literal["float32", "bfloat16"]
"""Of backbone and expert. Statistics of norms, noise levels, positions and the solver's arithmetic are float32 in both."""
