"""A run on its machine, from the recipe to the saved model."""

from vir_hf.moved import names_of

__getattr__ = names_of(
    "vir_hf.training.run", "vir_hf.training.inputs", "vir_hf.training.arguments", "vir_hf.training.summary"
)
