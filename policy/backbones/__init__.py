"""vlatune.policy.backbones"""
