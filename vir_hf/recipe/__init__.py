"""What is to be done: keys, files, rules, and the typed tree they make."""
