"""One image: where it lies, which one it is, opening it safely, and making it the tower's pixels."""
