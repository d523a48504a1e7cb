"""`vir-hf export RUN --to FORMAT OUT`: a run in another tool's format, proven by opening it again."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vir_hf.commands.outputs import add_json, add_overwrite, refuse_outputs, write_json

_TO = ("transformers", "adapter", "vllm", "gguf", "llava")
_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def main(argv: list[str]) -> int:
    """Export; return the exit code."""
    arguments = _parse(argv)
    inputs = [arguments.run, arguments.base, *arguments.images]
    refuse_outputs([("--json", arguments.json)], inputs, overwrite=arguments.overwrite)

    import torch

    from vir_hf.exporting.formats import export_run
    from vir_hf.exporting.request import Request

    request = Request(
        run=arguments.run,
        to=arguments.to,
        base=arguments.base,
        revision=arguments.revision,
        dtype="auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
        verify=arguments.verify,
        images=arguments.images,
        quantization=arguments.type,
        accepts_padding=arguments.accept_padding,
        accepts_class_token=arguments.accept_class_token,
    )
    exported = export_run(request, arguments.out)
    write_json(arguments.json, json.loads(json.dumps(dataclasses.asdict(exported), default=str)))
    if arguments.json != "-":
        print(f"exported {arguments.run} into {exported.out}, {len(exported.files)} files")
        for line in [*map(str, exported.proofs), *exported.notes]:
            print(f"  {line}")
        if not arguments.verify:
            print("  not verified")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vir-hf export",
        description="Write a run in another tool's format, then open the result in a process of its own and compare its logits "
        "and greedy answers with the run's. An export that fails the proof is not kept.",
        epilog="docs/export.md says what each format can express, and how each is opened.",
    )
    parser.add_argument("run", help="a run's output directory, a checkpoint-N in it, an adapter, or a model on the Hub")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--to", required=True, choices=_TO, help="the format")
    parser.add_argument("--base", metavar="DIR", help="where an adapter's base lies now, if it has been moved")
    parser.add_argument("--revision", help="of a model on the Hub")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="of the weights"
    )
    parser.add_argument("--type", default="f16", choices=_TYPES, help="of a GGUF's large weights (default f16)")
    parser.add_argument(
        "--accept-padding",
        action="store_true",
        help="gguf: let llama.cpp make an image a square in its own way, for images that are squares already",
    )
    parser.add_argument(
        "--accept-class-token",
        action="store_true",
        help="gguf: write a CLIP tower, for a llama.cpp that has the fix of its issue 25814",
    )
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="FILE", help="ask about these; drawn ones by default"
    )
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="prove the export (the default)"
    )
    add_json(parser, "the result")
    add_overwrite(parser)
    return parser.parse_args(argv)
