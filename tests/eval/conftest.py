"""Makes `tests/eval/fakes` importable, in spawned simulator workers too (they inherit sys.path)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "fakes"))
