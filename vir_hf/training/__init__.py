"""A run on its machine, from the recipe to the saved model."""
