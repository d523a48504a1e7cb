"""`vir-hf demo`: the demo in a browser, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from vir_hf.commands.answer import add_model_arguments
from vir_hf.errors import RecipeError
from vir_hf.recipe.files import packaged_directory


def main(argv: list[str]) -> int:
    """Serve the demo until Ctrl-C; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="vir-hf demo", description="Talk to a model about images in a browser. Serves this machine alone."
    )
    parser.add_argument("model", help="a run's folder, a checkpoint, an adapter or a Hub id")
    parser.add_argument("--base", metavar="MODEL", help="a second model, to see both answers side by side")
    add_model_arguments(parser)
    parser.add_argument("--port", type=int, default=7860, help="7860")
    parser.add_argument("--share", action="store_true", help="open a public link through Gradio's servers")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one answer (120)")
    parser.add_argument("--max-waiting", type=int, default=20, metavar="N", help="questions that may wait (20)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    arguments = parser.parse_args(argv)
    app = load_app()
    settings = app.Settings(
        model=arguments.model,
        adapter=arguments.adapter,
        base=arguments.base,
        load_in_4bit=arguments.load_in_4bit,
        device=arguments.device,
        timeout_seconds=arguments.timeout,
        max_waiting=arguments.max_waiting,
    )
    page = app.build(settings)
    try:
        app.launch(page, settings, server_port=arguments.port, share=arguments.share, inbrowser=arguments.open)
    except OSError as error:
        raise RecipeError(f"--port {arguments.port}: cannot be used ({error}). Name another one.") from error
    return 0


def load_app() -> Any:
    """Return the demo's module, which lies outside the package so that a Space is the same file.

    Raises:
        RecipeError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise RecipeError("the demo needs gradio: pip install 'vir-hf[space]'")
    path = Path(packaged_directory("spaces")) / "app.py"
    spec = importlib.util.spec_from_file_location("vir_hf_demo_app", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path}: cannot be loaded; install vir-hf again.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
