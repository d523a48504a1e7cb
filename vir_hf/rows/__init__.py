"""One row: what it says, how it is written as tokens, and what of it is learned."""

from vir_hf.moved import names_of

__getattr__ = names_of("vir_hf.data.located")
