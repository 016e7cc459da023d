"""Numbers as words of a sentence, for figures and findings."""

from collections.abc import Mapping, Sequence

from .intervals import Interval


def percent(share: float) -> str:
    """`97 %`; `99.6 %` where whole numbers would make it all or nothing."""
    whole = f"{100 * share:.0f}"
    if whole in ("0", "100") and share not in (0.0, 1.0):
        whole = f"{100 * share:.1f}".removesuffix(".0")
    return f"{whole} %"


def rate(interval: Interval) -> str:
    """`97 % (94–99)`."""
    low, high = (percent(bound).removesuffix(" %") for bound in (interval.low, interval.high))
    return f"{percent(interval.mean)} ({low}–{high})"


def rates(of: Mapping[str, Interval]) -> str:
    """`flow 97 % (94–99), L1 3 % (1–4)`."""
    return ", ".join(f"{name} {rate(interval)}" for name, interval in of.items())


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
