"""vlatune.policy.objectives"""
