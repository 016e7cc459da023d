"""vlatune.eval.benchmarks.pocket"""
