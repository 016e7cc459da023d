"""vlatune.policy.layers"""
