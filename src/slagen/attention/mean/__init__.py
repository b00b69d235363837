"""Exact attention to the selected key blocks, and one mean key and value for each rejected block."""
