"""Exact attention to the patches of 8x8 tokens that hold most of a pooled attention map, and to those near by."""
