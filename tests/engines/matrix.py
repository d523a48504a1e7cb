"""Which engine gives the answers we give, for every kind of folder a run leaves; the table of docs/engines.md.

python tests/engines/matrix.py ENVIRONMENT... [--work DIR] [--write docs/engines.md] [--families llama ...] [--kinds whole ...]

An environment is a folder made by `python -m venv`; one whose name begins with vllm runs vLLM, any other transformers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
NEW_TOKENS = 12
WAYS = ("single", "batched", "pipeline")


def our_answers(folder: Path, cases: list[dict[str, str]]) -> list[str]:
    """Greedy answers of this project, one by one."""
    import torch
    from PIL import Image

    from vir_hf.model.for_use import load_run

    model, processor = load_run(folder, dtype="float32", device="cpu")
    answers = []
    for case in cases:
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": case["question"]}]}]
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        image = Image.open(case["image"]).convert("RGB")
        inputs = processor(images=[image], text=prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def ask(environment: Path, folder: Path, cases: Path) -> dict[str, object]:
    """What an engine answers, in a process without this project; `{"error": ...}` where it does not open the folder."""
    is_vllm = environment.name.startswith("vllm")
    script = "answer_with_vllm.py" if is_vllm else "answer_with_transformers.py"
    base = [] if is_vllm or not (folder / "adapter_config.json").is_file() else [str(folder / "base")]
    out = cases.with_name("out.json")
    out.unlink(missing_ok=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"TRANSFORMERS_VERBOSITY": "error", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(environment / "bin" / "python"), str(HERE / script), str(cases), str(folder), str(out), *base]
    done = subprocess.run(command, env=clean, cwd=cases.parent, capture_output=True, text=True, timeout=1800)
    if done.returncode == 0 and out.is_file():
        return json.loads(out.read_text())
    lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
    return {"error": lines[-1].strip()[:160] if lines else f"ended with {done.returncode}"}


def cell(result: dict[str, object], expected: list[str]) -> str:
    """How many answers are ours, in each way the engine was asked."""
    if "error" in result:
        return f"does not open: {result['error']}".replace("|", "/")
    # A character cut off at the last token is written as U+FFFD by transformers and held back by vLLM.
    ours = [text.rstrip("\ufffd ") for text in expected]
    counts = [
        sum(text.rstrip("\ufffd ") == wanted for text, wanted in zip(result[way], ours, strict=True))
        for way in WAYS
        if way in result
    ]
    return " / ".join(map(str, counts))


def page(rows: list[tuple[str, str, list[str]]], engines: list[str], num_cases: int) -> str:
    """docs/engines.md."""
    head = ["checkpoint", "kind", *engines]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([family, kind, *cells]) + " |" for family, kind, cells in rows]
    table = "\n".join(lines)
    return f"""# Engines

Written by `make engines` on {datetime.date.today()}. Random checkpoints of real architectures are trained for two
steps, saved, and opened in environments of their own, without vir_hf. Each cell counts the greedy answers to {num_cases}
images, fp32 on a CPU, that equal ours: one by one / in left-padded batches of 4 / by `pipeline(..., batch_size=4)`;
vLLM is asked all at once. An adapter is opened by PEFT on `base/`.

{table}

A projector of our own is code that is saved with the checkpoint; it needs transformers 5 and `trust_remote_code=True`.
"""


def main() -> int:
    """Make the checkpoints, ask every engine, print the table; 1 where an engine that opens a folder answers otherwise."""
    import checkpoints

    parser = argparse.ArgumentParser()
    parser.add_argument("environments", nargs="+", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--families", nargs="+", default=list(checkpoints.PAIRS))
    parser.add_argument("--kinds", nargs="+", default=list(checkpoints.KINDS))
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="vir-hf-engines-"))
    folders = checkpoints.make(work, tuple(arguments.families), tuple(arguments.kinds))
    cases = json.loads((work / "cases.json").read_text())
    names = {environment: environment.name for environment in arguments.environments}
    rows, is_wrong = [], False
    for family in arguments.families:
        for kind in arguments.kinds:
            folder = folders[f"{family}/{kind}"]
            expected, cells = our_answers(folder, cases), []
            for environment in arguments.environments:
                if environment.name.startswith("vllm") and kind in ("adapter", "own projector"):
                    cells.append("-")
                    continue
                result = ask(environment.absolute(), folder, work.absolute() / "cases.json")
                if "version" in result:
                    word = "vLLM" if environment.name.startswith("vllm") else "transformers"
                    names[environment] = f"{word} {result['version']}"
                cells.append(cell(result, expected))
                is_wrong |= "error" not in result and set(cells[-1].split(" / ")) != {str(len(cases))}
                print(family, kind, environment.name, cells[-1], flush=True)
            rows.append((f"{family} + {checkpoints.PAIRS[family]}", kind, cells))
    text = page(rows, list(names.values()), len(cases))
    print(text)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
