"""lmms-eval run in a process of its own, and its results read: its exit status is 0 when an evaluation failed."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vir_hf.errors import RecipeError, RunError, clipped

HARNESS = "lmms-eval"
MODEL_NAME = "vir_hf"


def manifest() -> Any:
    """Return what lmms-eval's entry point `lmms_eval.models` wants to know of our model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_NAME, simple_class_path="vir_hf.using.lmms_eval_model.VirHf")


def run_harness(
    model: str,
    tasks: Sequence[str],
    output: Path,
    *,
    model_arguments: dict[str, Any] | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    include_path: str | None = None,
) -> list[dict[str, Any]]:
    """Return every score of every task, `{"dataset", "metric", "value", "num_rows", "compared_as"}`.

    Args:
        output: a folder that lmms-eval writes its own files into.
        limit: of each task, the first so many questions.
        include_path: a folder of tasks of one's own.

    Raises:
        RecipeError: lmms-eval is not installed.
        RunError: it wrote no results, or none for a task; with the end of what it said.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise RecipeError("--harness lmms-eval: is not installed. pip install 'vir-hf[lmms-eval]'.")
    given = {"pretrained": model, **(model_arguments or {})}
    words = [sys.executable, "-m", "lmms_eval", "--model", MODEL_NAME, "--tasks", ",".join(tasks)]
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
    words += ["--batch_size", str(batch_size), "--output_path", str(output), "--log_samples"]
    words += ["--limit", str(limit)] if limit else []
    words += ["--include_path", include_path] if include_path else []
    before = set(output.rglob("*_results.json"))
    process = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    written = sorted(set(output.rglob("*_results.json")) - before)
    said = clipped(" ".join(process.stdout.split())[-300:], 300)
    if process.returncode or not written:
        raise RunError(
            f"lmms-eval wrote no results into {output} (exit code {process.returncode}). Its last words: {said}"
        )
    return read_results(written[-1], tasks)


def read_results(path: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return the scores of a results file of lmms-eval.

    Raises:
        RunError: a task that was asked for has no score in it.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    results = []
    for task, scores in document.get("results", {}).items():
        count = (document.get("n-samples", {}).get(task) or {}).get("effective")
        for name, value in scores.items():
            metric, _, how = name.partition(",")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            if metric.endswith(("_stderr", "_clustered", "_stderr_clt")) or metric in ("samples",):
                continue
            results.append(
                {
                    "dataset": task,
                    "metric": metric if how in ("", "none") else f"{metric}, {how}",
                    "value": value,
                    "num_rows": count or 0,
                    "compared_as": f"lmms-eval {_version()}".strip(),
                }
            )
    missing = [task for task in tasks if not any(_is_of(row["dataset"], task, document) for row in results)]
    if missing:
        raise RunError(
            f"lmms-eval gave no score for {', '.join(missing)}: {path}. Look at what it printed for that task."
        )
    return results


def _version() -> str:
    try:
        return version("lmms-eval")
    except PackageNotFoundError:  # run from its source
        return ""


def _is_of(dataset: str, task: str, document: dict[str, Any]) -> bool:
    return dataset == task or dataset in document.get("group_subtasks", {}).get(task, [])
