"""Objectives. Adding one is a file here and its name in the union below."""

from .flow import Flow

ObjectiveConfig = Flow
"""The union of all objectives: each is its own config."""
