"""A run on the Hub: the card, the upload, the Space."""
