"""The words after `vir-hf`: one module each, with `main(argv) -> exit code`. They parse and print; the logic lies outside."""
