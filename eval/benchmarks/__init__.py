"""Benchmarks by name. Adding one is a folder here and a line below."""

import importlib

from .benchmark import Benchmark

BENCHMARKS = {
    "pocket": ".pocket.benchmark",
    "libero": ".libero.benchmark",
}


def load_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`: each module has a function `make()`."""
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    benchmark: Benchmark = importlib.import_module(BENCHMARKS[name], __package__).make()
    return benchmark
