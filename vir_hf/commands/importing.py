"""`vir-hf import SOURCE OUT`: a checkpoint of another project as a folder that opens here."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vir_hf.commands.outputs import add_json, add_overwrite, refuse_outputs, write_json

_TEMPLATES = ("vicuna_v1", "plain", "llama_2", "llama_3", "chatml", "auto")


def main(argv: list[str]) -> int:
    """Import; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="vir-hf import",
        description="Make a folder that opens here, and in stock transformers, of a checkpoint of the original LLaVA (whole, "
        "LoRA or projector), of llava-hf, TinyLLaVA or XTuner. Every tensor is accounted for; one without a place is an error.",
        epilog="Files are read as tensors alone; nothing in them is run. The report is OUT/import.json.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a repository on the Hub")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--base", metavar="NAME", help="the language model of an adapter or a projector")
    parser.add_argument("--vision-tower", metavar="NAME", help="the tower, where its name in the config is not at hand")
    parser.add_argument("--template", choices=_TEMPLATES, help="the chat template it was trained with")
    parser.add_argument(
        "--drop", nargs="+", default=[], metavar="NAME", help="leave these tensors out; * stands for anything"
    )
    add_json(parser, "what became of every tensor")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    inputs = [arguments.source, arguments.base, arguments.vision_tower]
    refuse_outputs([("--json", arguments.json)], inputs, overwrite=arguments.overwrite)

    from vir_hf.exporting.importing import import_checkpoint
    from vir_hf.model.foreign import LAYOUTS

    imported = import_checkpoint(
        arguments.source,
        arguments.out,
        base=arguments.base,
        vision_tower=arguments.vision_tower,
        template=arguments.template,
        drop=arguments.drop,
    )
    report = json.loads(json.dumps({**dataclasses.asdict(imported), "counts": imported.counts()}, default=str))
    write_json(arguments.json, report)
    if arguments.json != "-":
        counts = ", ".join(f"{number} {what}" for what, number in sorted(imported.counts().items()))
        print(f"imported {arguments.source}, {LAYOUTS[imported.layout]}, into {imported.out}\n  tensors: {counts}")
        for part, name in imported.from_elsewhere.items():
            print(f"  {part}: not in the checkpoint, taken from {name}")
        print(f"next:\n  vir-hf chat {imported.out} --image photo.jpg")
    return 0
