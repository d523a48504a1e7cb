"""Data sets: sources and mixtures become rows whose images are located, cached and checked."""
