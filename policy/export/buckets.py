"""The static shapes of an export: a graph is for so many observations, so many prompt tokens and these cameras.

What is smaller is padded: rows by repeating the last one, prompts by masked tokens."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The shapes that one pair of graphs is for."""

    batch: int
    """Observations a call."""
    prompt_tokens: int
    """Tokens that a prompt is padded to."""
    cameras: tuple[str, ...]
    """Those whose pictures it reads, in the policy's order; the policy's others count as absent."""

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.prompt_tokens} prompt tokens, {' + '.join(self.cameras)}"


def make_buckets(
    batch_sizes: Sequence[int], prompt_tokens: Sequence[int], camera_sets: Iterable[str], cameras: tuple[str, ...]
) -> tuple[Bucket, ...]:
    """Every combination, each once. A camera set is names joined by commas; without any, all of the policy's `cameras`.

    Raises ValueError for a size below 1 or a camera that the policy does not have."""
    for name, sizes in (("--batch-sizes", batch_sizes), ("--prompt-tokens", prompt_tokens)):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"{name} is {' '.join(map(str, sizes)) or 'empty'}; give numbers from 1")
    sets = [_camera_set(names, cameras) for names in camera_sets] or [cameras]
    combinations = itertools.product(sorted(set(batch_sizes)), sorted(set(prompt_tokens)), dict.fromkeys(sets))
    return tuple(Bucket(batch=batch, prompt_tokens=tokens, cameras=chosen) for batch, tokens, chosen in combinations)


def _camera_set(names: str, cameras: tuple[str, ...]) -> tuple[str, ...]:
    given = [name.strip() for name in names.split(",")]
    unknown = [name for name in given if name not in cameras]
    if unknown:
        raise ValueError(
            f"--camera-sets {names}: the policy has no camera {unknown[0]!r}; it has {', '.join(cameras)}, and a set is some of them joined "
            "by commas"
        )
    return tuple(camera for camera in cameras if camera in given)


def fitting(buckets: Sequence[Bucket], *, batch: int, num_tokens: int, cameras: Collection[str]) -> Bucket:
    """The one that reads most of `cameras`, then takes `batch` rows in the fewest calls, then computes least.

    Raises ValueError if no bucket can do with these cameras, or all are too short for `num_tokens`."""
    readable = [bucket for bucket in buckets if set(bucket.cameras) <= set(cameras)]
    if not readable:
        sets = dict.fromkeys(",".join(bucket.cameras) for bucket in buckets)
        raise ValueError(
            f"the observation has cameras {', '.join(sorted(cameras)) or 'none'}, and the export has graphs for {' and for '.join(sets)}; "
            "export another set with --camera-sets"
        )
    most = max(len(bucket.cameras) for bucket in readable)
    with_most = [bucket for bucket in readable if len(bucket.cameras) == most]
    long_enough = [bucket for bucket in with_most if bucket.prompt_tokens >= num_tokens]
    if not long_enough:
        raise ValueError(
            f"the longest prompt has {num_tokens} tokens, and the export's graphs read {max(b.prompt_tokens for b in with_most)}; shorten the "
            f"instruction, or export again with --prompt-tokens {num_tokens}"
        )
    return min(long_enough, key=lambda bucket: (-(-batch // bucket.batch), bucket.prompt_tokens, bucket.batch))
