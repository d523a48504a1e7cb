"""`vir-hf data WORD`: hands over to the command of that word."""

from __future__ import annotations

import difflib
import importlib

from vir_hf.errors import RecipeError

WORDS = {
    "check": ("vir_hf.commands.data_check", "what is wrong with a data set, by row and reason"),
    "inspect": ("vir_hf.commands.data_inspect", "rows as the model will see them: tokens, labels, images"),
    "mix": ("vir_hf.commands.data_mix", "what a mixture comes to: rows, images and tokens by source"),
    "new": ("vir_hf.commands.data_new", "rows from a table, folders of classes, or images with texts"),
    "prepare": ("vir_hf.commands.data_prepare", "a subset with its images copied, linked or downloaded"),
    "cache-features": ("vir_hf.commands.cache_features", "encode every image once, ahead of training"),
    "download-models": ("vir_hf.commands.data_models", "fetch the weights and processors a recipe needs"),
}


def main(argv: list[str]) -> int:
    """Carry out `vir-hf data ...` and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: vir-hf data WORD [arguments]\n\nwords:")
        for word, (_, help_text) in WORDS.items():
            print(f"  {word:<18}{help_text}")
        print("\n`vir-hf data WORD --help` explains one.")
        return 0 if argv else 2
    if argv[0] not in WORDS:
        near = difflib.get_close_matches(argv[0], WORDS, n=1)
        hint = f" Did you mean `vir-hf data {near[0]}`?" if near else ""
        raise RecipeError(f"data: unknown word {argv[0]!r}; expected one of {', '.join(WORDS)}.{hint}")
    return int(importlib.import_module(WORDS[argv[0]][0]).main(argv[1:]))
