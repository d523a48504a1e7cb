"""What is to be done: keys, files, rules, and the typed tree they make."""

from vir_hf.moved import names_of

__getattr__ = names_of("vir_hf.recipe.load", "vir_hf.recipe.sections")
