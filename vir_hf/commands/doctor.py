"""`vir-hf doctor`: what this machine has, what a checkpoint is, and the proof that fast batches equal single rows."""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Sequence
from importlib import metadata, util
from typing import Any

from vir_hf import __version__
from vir_hf.commands.installation import look
from vir_hf.commands.outputs import add_json, add_overwrite, recipe_inputs, refuse_outputs, write_json
from vir_hf.recipe.load import RecipeArgumentParser, recipe_from

_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "flash_attn",
    "simplejpeg",
    "numba",
    "gguf",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if training can run here, 1 if it cannot or if batches differ from single rows."""
    parser = RecipeArgumentParser(
        prog="vir-hf doctor",
        description="Check this installation: versions, the torch build against the GPU, optional packages, disk, Hub login, "
        "and say what to install. With a CHECKPOINT, say what it is, which tools open it as it stands, and which export makes "
        "the others do so. With a recipe (experiment=NAME data.data_path=...), prove in addition that padding-free batches "
        "with shared prefixes have the loss and gradients of single rows, on its model, processor and rows in fp32.",
    )
    parser.add_argument("--rows", type=int, default=8, help="rows to compare (default 8)")
    add_json(parser, "the findings")
    add_overwrite(parser)
    options = parser.parse_args(argv)
    recipe = None
    if len(options.overrides) == 1 and "=" not in options.overrides[0]:
        return look_at(options.overrides[0], options)
    if options.overrides or options.recipe:
        recipe = recipe_from(options)
    inputs = [] if recipe is None else recipe_inputs(recipe, options.recipe)
    refuse_outputs([("--json", options.json)], inputs, overwrite=options.overwrite)
    checks = look()
    findings: dict[str, Any] = {"machine": machine(), "checks": [dataclasses.asdict(finding) for finding in checks]}
    if recipe is not None:
        findings["comparisons"] = prove(recipe, options.rows)
    if options.json != "-":
        show(findings)
    write_json(options.json, findings)
    can_train = all(finding.state != "wrong" for finding in checks)
    return 0 if can_train and all(entry["is_exact"] for entry in findings.get("comparisons", [])) else 1


def look_at(checkpoint: str, options: Any) -> int:
    """Print what a checkpoint is and who opens it; return the exit code."""
    from vir_hf.exporting.identify import as_block, identify

    refuse_outputs([("--json", options.json)], [checkpoint], overwrite=options.overwrite)
    findings, versions = identify(checkpoint), {"vir_hf": __version__, **machine()}
    write_json(options.json, {"machine": versions, **dataclasses.asdict(findings)})
    if options.json == "-":
        return 0
    print(f"{checkpoint}: {findings.what}")
    for name, value in {**findings.facts, **findings.fingerprints}.items():
        print(f"  {name:<16} {value}")
    print("opened as it stands by:")
    for opening in findings.openings:
        print(f"  {opening.tool:<18} {'yes' if opening.opens else 'no ':<4} {opening.how}")
    print(f"\n{as_block({'checkpoint': findings.what, **versions})}")
    return 0


def machine() -> dict[str, Any]:
    """Return versions and what the accelerator can do."""
    import torch

    from vir_hf.images.preprocessing import what_is_slow

    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["bf16"] = properties.major >= 8
        has_flash = util.find_spec("flash_attn") is not None
        found["attention"] = "flash_attn" if has_flash else "varlen" if properties.major >= 8 else "flex"
    else:
        found["gpu"], found["attention"] = None, "torch's CPU kernel, piece by piece"
    found["pictures"] = what_is_slow() or "decoded by simplejpeg, resized by numba's kernels, the bits of Pillow"
    return found


def prove(recipe: Any, num_rows: int) -> list[dict[str, Any]]:
    """Return how far each way to make batches is from rows one at a time, on the recipe's own parts."""
    import torch

    from vir_hf.data.sources import load_recipe_rows
    from vir_hf.model.for_training import load_model_and_processor
    from vir_hf.model.language_models import fit_to_language_model
    from vir_hf.model.precision import Precision
    from vir_hf.model.trainable import make_trainable
    from vir_hf.training.exactness import compare_ways

    recipe = fit_to_language_model(recipe)
    recipe.quantization.arguments.clear()  # 4-bit weights compute in 16 bit, too coarse for a proof
    torch.manual_seed(0)
    model, processor = load_model_and_processor(recipe, Precision(torch.float32, None, "a proof is in fp32"))
    rows = load_recipe_rows(recipe)
    trained = make_trainable(model, recipe)
    if torch.cuda.is_available() and not recipe.training.use_cpu:
        trained = trained.to("cuda")
    if recipe.training.activation_checkpointing:
        trained.enable_input_require_grads()
        trained.activation_checkpointing_enable({"use_reentrant": False})
    chosen = [rows[number] for number in range(min(num_rows, len(rows)))]
    comparisons = compare_ways(
        trained, processor, chosen, recipe.training.max_length, padding_free=recipe.training.padding_free
    )
    return [{**dataclasses.asdict(entry), "is_exact": entry.is_exact} for entry in comparisons]


def show(findings: dict[str, Any]) -> None:
    """Print the findings as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)
    table = Table("this machine", "", title=None)
    for name, value in findings["machine"].items():
        table.add_row(name, "not installed" if value is None else str(value))
    console.print(table)
    checks = Table("checked", "", "found", "what to do")
    marks = {"ok": "ok", "missing": "optional", "wrong": "[bold red]WRONG[/]"}
    for check in findings["checks"]:
        checks.add_row(check["name"], marks[check["state"]], escape(check["found"]), escape(check["remedy"]))
    console.print(checks)
    if "comparisons" in findings:
        proof = Table("batches", "loss", "loss differs by", "gradients differ by", "tokens", "exact")
        for entry in findings["comparisons"]:
            proof.add_row(
                entry["name"],
                f"{entry['loss']:.6f}",
                f"{entry['loss_difference']:.1e}",
                f"{entry['gradient_difference']:.1e}",
                str(entry["num_tokens"]),
                "yes" if entry["is_exact"] else f"NO: {entry['worst_weight']}",
            )
        console.print(proof)
    else:
        console.print(
            "To prove that fast batches change nothing: vir-hf doctor experiment=NAME data.data_path=rows.json"
        )


if __name__ == "__main__":
    sys.exit(main())
