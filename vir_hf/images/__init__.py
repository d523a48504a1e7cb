"""One image: where it lies, which one it is, opening it safely, and making it the tower's pixels."""

from vir_hf.moved import names_of

__getattr__ = names_of("vir_hf.images.opening")
