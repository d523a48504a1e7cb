"""Which rows share a step and how they become one batch."""
