"""The compiled acting path: `sampler.py` says what it does."""
