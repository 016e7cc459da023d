"""``vlatune power 0.94 0.97``: how many episodes it takes to tell two success rates apart, and what common numbers can.

Numbers of episodes come from the usual normal approximations (Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions, 3rd
edition, section 4.2; for pairs Connor, Biometrics 43, 1987, p. 207); the power of a number of episodes is exact: the probabilities of all
outcomes that the test rejects, added up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from .text_tables import aligned

_NEGLIGIBLE = 1e-10
"""Outcomes rarer than this, at either end, are not added up."""


@dataclass(frozen=True, kw_only=True)
class PowerConfig:
    """How many episodes tell two success rates apart: of independent episodes, and of pairs on the same init states.

    Tests are two-sided. A one-sided test at 0.05 needs what a two-sided one needs at 0.1. All of this is about two checkpoints on a
    fixed list of tasks: another training seed, or new tasks, vary by more."""

    first: Annotated[float, tyro.conf.Positional]
    """Success rate of one policy, as a share: 0.94."""
    second: Annotated[float, tyro.conf.Positional]
    """Success rate of the other, as a share: 0.97."""
    episodes: tuple[int, ...] = (100, 500, 2000)
    """Episodes per policy (pairs, where paired) whose power is computed."""
    paired_discordance: tuple[float, ...] = ()
    """Shares of init states on which just one of the two policies succeeds; if not given, those of correlations 0, 0.25 and 0.5 as far as
    they are possible. `vlatune.eval.comparison.compare` measures it."""
    power: tuple[float, ...] = (0.8, 0.9)
    """Probabilities of finding the difference for which numbers of episodes are computed."""
    alpha: float = 0.05
    """Probability of finding a difference where there is none."""

    def __post_init__(self) -> None:
        for name, share in (("first", self.first), ("second", self.second)):
            if not 0 <= share <= 1:
                raise ValueError(f"the {name} success rate is {share:g}; rates are shares from 0 to 1, 0.94 for 94 %")
        if self.first == self.second:
            raise ValueError(f"both success rates are {self.first:g}: no number of episodes tells equal policies apart")
        for name, shares in (("--power", self.power), ("--alpha", (self.alpha,))):
            for share in shares:
                if not 0 < share < 1:
                    raise ValueError(
                        f"{name} {share:g}: a probability between 0 and 1 is needed, for instance 0.8 or 0.05"
                    )
        if min(self.episodes, default=1) < 1:
            raise ValueError(f"--episodes {min(self.episodes)}: at least 1")
        low, high = discordance_range(self.first, self.second)
        for share in self.paired_discordance:
            if not low - 1e-12 <= share <= high + 1e-12:
                raise ValueError(
                    f"--paired-discordance {share:g}: policies that solve {self.first:g} and {self.second:g} of the episodes "
                    f"disagree on {low:.3g} to {high:.3g} of them"
                )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises what `PowerConfig` raises."""
    print(describe(tyro.cli(PowerConfig, args=None if argv is None else list(argv), prog="vlatune power")))


def describe(config: PowerConfig) -> str:
    """The answer as a table of text."""
    first, second, alpha = config.first, config.second, config.alpha
    head = [f"{share:.0%} power" for share in config.power] + [f"{count:,}" for count in config.episodes]
    lines = [["", *head]]
    needed = [episodes_unpaired(first, second, power=share, alpha=alpha) for share in config.power]
    found = [power_unpaired(first, second, count, alpha=alpha) for count in config.episodes]
    exact = [power_unpaired(first, second, count, alpha=alpha) for count in needed]
    lines.append(_line("independent episodes", needed, exact, found))
    for label, share in _designs(config):
        needed = [episodes_paired(first, second, share, power=wanted, alpha=alpha) for wanted in config.power]
        found = [power_paired(first, second, share, count, alpha=alpha) for count in config.episodes]
        exact = [power_paired(first, second, share, count, alpha=alpha) for count in needed]
        lines.append(_line(label, needed, exact, found))
    target, weaker = config.power[0] if config.power else 0.8, min(first, second)
    gains = [detectable_gain(weaker, count, power=target, alpha=alpha) for count in config.episodes]
    gained = ["none" if gain is None else f"+{100 * gain:.1f} pp" for gain in gains]
    lines.append([f"gain over {weaker:g} found with {target:.0%} power", *([""] * len(config.power)), *gained])
    table = aligned(lines)
    return (
        f"{first:g} against {second:g}, two-sided at {alpha:g}.\n"
        "Left: episodes per policy by the normal approximation, in brackets the exact power of so many.\n"
        "Right: the exact power of given numbers of episodes.\n\n"
        f"{table}\n\n"
        "Independent episodes (and the last line): the pooled z test.\n"
        "Pairs of the same task, init state and seed: McNemar's exact test; ψ is the share of pairs on which just one\n"
        "policy succeeds."
    )


def _line(label: str, needed: Sequence[int], exact: Sequence[float], found: Sequence[float]) -> list[str]:
    sizes = [f"{count:,} ({share:.1%})" for count, share in zip(needed, exact, strict=True)]
    return [label, *sizes, *(f"{share:.1%}" for share in found)]


def _designs(config: PowerConfig) -> list[tuple[str, float]]:
    """(label, discordance) of every paired design to show."""
    if config.paired_discordance:
        return [(f"pairs, ψ {share:.3g}", share) for share in config.paired_discordance]
    fewest, _ = discordance_range(config.first, config.second)
    varies = {0.0, 1.0}.isdisjoint((config.first, config.second))  # what never varies correlates with nothing
    shares = {rho: discordance(config.first, config.second, rho) for rho in ((0.0, 0.25, 0.5) if varies else (0.0,))}
    return [(f"pairs, correlation {rho:g} (ψ {share:.3g})", share) for rho, share in shares.items() if share >= fewest]


def discordance(first: float, second: float, correlation: float) -> float:
    """Share of pairs on which just one policy succeeds, if the two outcomes correlate so: p₁ q₂ + q₁ p₂ - 2 ρ √(p₁ q₁ p₂ q₂)."""
    spread = math.sqrt(first * (1 - first) * second * (1 - second))
    return first * (1 - second) + (1 - first) * second - 2 * correlation * spread


def discordance_range(first: float, second: float) -> tuple[float, float]:
    """The least and the largest share of pairs on which policies of these rates can disagree."""
    return abs(first - second), first + second - 2 * max(0.0, first + second - 1)


def episodes_unpaired(first: float, second: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Episodes per policy: [z(1-α/2) √(2 p̄ q̄) + z(power) √(p₁ q₁ + p₂ q₂)]² / (p₁ - p₂)²."""
    mean = (first + second) / 2
    alike, apart = math.sqrt(2 * mean * (1 - mean)), math.sqrt(first * (1 - first) + second * (1 - second))
    return math.ceil(((_z(1 - alpha / 2) * alike + _z(power) * apart) / (first - second)) ** 2)


def episodes_paired(first: float, second: float, discordant: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Pairs: [z(1-α/2) √ψ + z(power) √(ψ - d²)]² / d², with d = p₁ - p₂ and ψ = `discordant`."""
    difference = first - second
    apart = math.sqrt(max(0.0, discordant - difference**2))
    return math.ceil(((_z(1 - alpha / 2) * math.sqrt(discordant) + _z(power) * apart) / difference) ** 2)


def power_unpaired(first: float, second: float, episodes: int, *, alpha: float = 0.05) -> float:
    """Probability that the two-sided z test with pooled variance tells the rates apart, with so many episodes of each. Exact."""
    from scipy.stats import binom

    k_A, k_B = _likely(episodes, first), _likely(episodes, second)
    apart_AB = np.abs(k_A[:, None] - k_B) / episodes
    pooled_AB = (k_A[:, None] + k_B) / (2 * episodes)
    rejected_AB = apart_AB > _z(1 - alpha / 2) * np.sqrt(2 * pooled_AB * (1 - pooled_AB) / episodes)
    return float(binom.pmf(k_A, episodes, first) @ rejected_AB @ binom.pmf(k_B, episodes, second))


def power_paired(first: float, second: float, discordant: float, pairs: int, *, alpha: float = 0.05) -> float:
    """Probability that McNemar's exact test tells the policies apart on so many pairs, of which each is discordant with probability
    `discordant`. Exact."""
    from scipy.stats import binom

    total_D = _likely(pairs, discordant)
    of_first = min(1.0, max(0.0, (discordant + first - second) / (2 * discordant)))
    # the largest count that is rejected at the lower end; -1 where none is
    last_D = binom.ppf(alpha / 2, total_D, 0.5)
    last_D = np.where(binom.cdf(last_D, total_D, 0.5) <= alpha / 2, last_D, last_D - 1)
    rejected_D = binom.cdf(last_D, total_D, of_first) + binom.cdf(last_D, total_D, 1 - of_first)
    return float(binom.pmf(total_D, pairs, discordant) @ rejected_D)


def detectable_gain(rate: float, episodes: int, *, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """How much better a policy than one of this rate must be for `episodes_unpaired` to ask for so many episodes; None where even a
    perfect one would not be told apart."""
    from scipy.optimize import brentq

    def missing(better: float) -> float:
        mean = (rate + better) / 2
        alike, apart = math.sqrt(2 * mean * (1 - mean)), math.sqrt(rate * (1 - rate) + better * (1 - better))
        return _z(1 - alpha / 2) * alike + _z(power) * apart - math.sqrt(episodes) * (better - rate)

    smallest = rate + 1e-9  # a rate of 0 or 1 varies by nothing: it would be its own solution
    return None if smallest >= 1 or missing(1.0) > 0 else float(brentq(missing, smallest, 1.0)) - rate


def _likely(trials: int, rate: float) -> np.ndarray:
    """The counts of successes that are not negligible."""
    from scipy.stats import binom

    return np.arange(int(binom.ppf(_NEGLIGIBLE, trials, rate)), int(binom.ppf(1 - _NEGLIGIBLE, trials, rate)) + 1)


def _z(probability: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(probability))


if __name__ == "__main__":
    main()
