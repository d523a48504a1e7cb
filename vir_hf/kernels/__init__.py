"""Layers that do the same sums in less time and memory."""
