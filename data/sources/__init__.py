"""Readers (and writers) of demonstrations."""
