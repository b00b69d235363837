"""Exact attention within a fixed band of tokens that narrows with the distance between frames."""
