"""vlatune.policy.checkpoints"""
