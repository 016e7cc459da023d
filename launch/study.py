"""``vlatune study NAME``: questions that a command answers with a figure, tables and a paragraph, on a CPU in minutes."""

import importlib
import sys
from collections.abc import Sequence

from ..data.named import named

STUDIES = {
    "bimodal": (".studies.bimodal", "left-or-right demonstrations: which objectives learn both sides? 10 minutes"),
    "steps": (".studies.steps", "quality and time against the number of sampling steps, after bimodal; a minute"),
    "objective": (".studies.objective", "objectives on one pocket recipe, three seeds, paired tests; about an hour"),
    "chunk": (".studies.chunk", "chunk lengths 4, 16 and 50 on pocket, three seeds, paired tests; about an hour"),
    "freeze": (
        ".studies.freeze",
        "expert alone, LoRA or everything, from a pretrained policy on held-out tasks; 25 minutes",
    ),
    "align": (".studies.align", "L1 and RS-IMLE from a pretrained flow policy, aligned with it or not; 30 minutes"),
    "delay": (".studies.delay", "decisions that come late: waiting, going on, real-time chunking; about 40 minutes"),
}
"""name -> (module with a `main(argv)`, one line of help)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one study, or list them. Raises ValueError with the nearest name where there is none."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {name:10} {about}" for name, (_, about) in STUDIES.items())
        print(
            f"usage: vlatune study NAME [settings]\n\n{lines}\n\n"
            "vlatune study NAME --help lists a study's settings. Times are those of two CPU cores."
        )
        return
    module, _ = named("study", name, STUDIES)
    importlib.import_module(module, __package__).main(words[1:])


if __name__ == "__main__":
    main()
