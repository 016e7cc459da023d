"""vlatune.eval.benchmarks.libero"""
