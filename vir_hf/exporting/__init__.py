"""Checkpoints in the words of other tools, and theirs in ours, each proven by opening it again."""
