"""``vlatune inspect``: what a cache holds, for a person to look at before training on it."""
