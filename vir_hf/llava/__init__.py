"""The model files that travel with a checkpoint: they import transformers, torch and each other, and nothing else."""
