"""Robot cards, one file a robot."""
