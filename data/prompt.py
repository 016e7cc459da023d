"""How an instruction, and for some policies the state, becomes the text that is tokenised."""

from typing import Literal, get_args

import numpy as np

PromptStyle = Literal["instruction", "newline", "pi05"]
"""`instruction`: as it is. `newline`: ended by a line break (π0, SmolVLA, and π0.5 without its state, as openpi's LIBERO
checkpoint has it). `pi05`: `Task: …, State: …;` and the state's 256 bins on [-1, 1], then `Action: `."""

NUM_STATE_BINS = 256


def prompt_text(style: PromptStyle, instruction: str, state_S: np.ndarray) -> str:
    """The text of one sample. `state_S` is the newest, normalised state in the robot's own dimensions.

    Raises ValueError for another style."""
    match style:
        case "instruction":
            return instruction
        case "newline":
            return f"{instruction.strip()}\n"
        case "pi05":
            cleaned = instruction.strip().replace("_", " ").replace("\n", " ")
            # The left edges of the bins; a value below -1 falls into bin -1, as in the reference.
            edges = np.linspace(-1, 1, NUM_STATE_BINS + 1)[:-1]
            bins = " ".join(map(str, np.digitize(state_S, edges) - 1))
            return f"Task: {cleaned}, State: {bins};\nAction: "
    raise ValueError(f"the prompt style is {style!r}; it can be {', '.join(get_args(PromptStyle))}")
