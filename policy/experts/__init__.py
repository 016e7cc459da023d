"""vlatune.policy.experts"""
