"""vlatune.eval.report"""
