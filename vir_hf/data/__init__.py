"""Data sets: sources and mixtures become rows whose images are located, cached and checked."""

from vir_hf.moved import names_of

__getattr__ = names_of("vir_hf.data.sources")
