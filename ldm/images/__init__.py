"""Pixels of any kind: reading, writing, sheets."""
