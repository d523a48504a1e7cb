"""`vir-hf space`: publish the demo as a Space."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vir_hf.commands.push import print_folder
from vir_hf.errors import RecipeError

_EPILOG = """\
examples:
  vir-hf space you/my-model you/my-demo --dry-run --folder my-demo
  vir-hf space you/my-model you/my-demo --base llava-hf/llava-1.5-7b-hf --hardware t4-small
  vir-hf space you/my-private-model you/my-demo --private --model-token-from HF_READ_TOKEN
"""


def main(argv: list[str]) -> int:
    """Create and fill a Space, or write its folder; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="vir-hf space",
        description="Publish the demo of a model as a Space.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the Hub id of a model or an adapter")
    parser.add_argument("repo", help="USER/NAME of the Space")
    parser.add_argument("--base", metavar="MODEL", help="a second model on the Hub, to see both answers side by side")
    parser.add_argument("--title", default="", help="the model's name by default")
    parser.add_argument("--hardware", metavar="WORD", help="the Hub's word for it: cpu-basic, t4-small, a10g-small ...")
    parser.add_argument("--zero-gpu", action="store_true", help="run answers on ZeroGPU")
    parser.add_argument("--load-in-4bit", action="store_true", help="NF4 weights, through bitsandbytes")
    parser.add_argument("--private", action="store_true", help="visible to its owner alone")
    parser.add_argument("--update", action="store_true", help="replace what the Space holds, whatever it is")
    parser.add_argument(
        "--model-token-from", metavar="VARIABLE", help="an environment variable whose token becomes the Space's secret"
    )
    parser.add_argument("--dry-run", action="store_true", help="write the folder and open no connection")
    parser.add_argument("--folder", metavar="DIR", help="where --dry-run writes (the Space's name)")
    arguments = parser.parse_args(argv)

    from vir_hf.publishing import hub, space

    options = space.SpaceOptions(
        model=arguments.model,
        base=arguments.base,
        title=arguments.title,
        load_in_4bit=arguments.load_in_4bit,
        zero_gpu=arguments.zero_gpu,
        hardware=arguments.hardware,
    )
    if arguments.dry_run:
        hub.check_repo_id(arguments.repo)
        folder = Path(arguments.folder or arguments.repo.split("/")[-1])
        space.write_space(folder, options)
        print_folder(folder)
        print(f"nothing was sent. To try it here: python {folder}/app.py")
        return 0
    variable = arguments.model_token_from
    if variable and not os.environ.get(variable):
        raise RecipeError(f"--model-token-from {variable}: this environment variable is not set.")
    model_token = os.environ[variable] if variable else None
    published = space.push_space(
        arguments.repo, options, private=arguments.private, update=arguments.update, model_token=model_token
    )
    print(published.url)
    return 0
