"""Sparse-linear attention (SLA)."""
