"""Looking at data before it is trained on: checks, fixes, inspection, preparation, and their pages."""
