"""Predicted against measured peak memory of training, by the trainer itself, one process a case.

    python benchmarks/memory.py                             # this machine: CPU resident memory, small models
    python benchmarks/memory.py --cases gpu --json mem.json # on a CUDA GPU: 7B shapes, torch's allocated peak
    python benchmarks/memory.py --cases smollm/lora smollm/lora+ckpt

Weights are random and rows are generated, all of one length: memory does not depend on their values. On a GPU the predicted
peak is compared with `torch.cuda.max_memory_allocated`, on a CPU with the resident memory from the first step on.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20

# (width, intermediate, layers, heads, kv heads, vocabulary), (width, intermediate, layers, heads)
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((256, 688, 4, 8, 8, 8000), (256, 1024, 3, 4)),
    "smollm": ((576, 1536, 8, 9, 3, 49152), (1024, 4096, 3, 16)),
    "smollm135m": ((576, 1536, 30, 9, 3, 49152), (1024, 4096, 24, 16)),
    "tinyllama": ((2048, 5632, 3, 32, 4, 32000), (1024, 4096, 3, 16)),
    "tinyllama1b": ((2048, 5632, 22, 32, 4, 32000), (1024, 4096, 24, 16)),
    "llava7b": ((4096, 11008, 32, 32, 32, 32000), (1024, 4096, 24, 16)),
}
_LORA = ["lora=default", "trainable.language_model=lora"]
METHODS: dict[str, list[str]] = {
    "full": ["lora=none", "trainable.language_model=full"],
    "lora": [*_LORA, "lora.lora_dropout=0.0"],
    "dropout": _LORA,
    "qlora": [*_LORA, "lora.lora_dropout=0.0", "quantization=nf4", "quantization.only_on_cuda=false"],
    "projector": ["lora=none", "trainable.language_model=frozen"],
    "tower": ["lora=none", "trainable.language_model=frozen", "trainable.vision_tower=full"],
}
CASES = {
    "cpu": [f"smollm/{method}{ckpt}" for method in ("full", "lora", "qlora") for ckpt in ("", "+ckpt")]
    + ["smollm/dropout", "smollm/projector", "tinyllama/lora"],
    "gpu": [
        "llava7b/qlora+ckpt",
        "llava7b/lora+ckpt",
        "llava7b/projector+ckpt",
        "tinyllama1b/lora",
        "tinyllama1b/full+ckpt",
        "tinyllama1b/full",
        "smollm135m/lora",
        "smollm135m/dropout+ckpt",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="cpu, gpu, or shape/method with +ckpt for checkpointing")
    parser.add_argument("--rows", type=int, default=2, help="rows a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--words", type=int, default=100, help="words a row besides its picture")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--threshold", type=int, metavar="KIB", help="on a CPU: KiB from which tensors are mapped; 0 leaves it to glibc"
    )
    parser.add_argument("--json", help="write the figures to a file, or - for standard output")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print("RESULT " + json.dumps(run_case(options)), flush=True)
        return 0
    wanted = options.cases or ["gpu" if _has_cuda() else "cpu"]
    cases = [case for word in wanted for case in CASES.get(word, [word])]
    results = []
    with tempfile.TemporaryDirectory() as work:
        for case in cases:
            results.append(run_in_process(case, work))
            print(line(results[-1]), flush=True)
    if options.json:
        text = json.dumps({"machine": platform.platform(), "results": results}, indent=2) + "\n"
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text, encoding="utf-8")
    return 0


def line(result: dict[str, Any]) -> str:
    error = result["predicted"] / result["measured"] - 1
    return (
        f"{result['case']:<26} {result['device']:<6} predicted {result['predicted'] / MIB:8.0f} MiB   "
        f"measured {result['measured'] / MIB:8.0f} MiB   {error:+.1%}   {result['tokens']} tokens, {result['seconds']:.0f} s"
    )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run_in_process(case: str, work: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--work", work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"{case} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(found[-1].removeprefix("RESULT "))


def run_case(options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps of one case and return what was measured and what was predicted."""
    from vir_hf.recipe.load import load_recipe

    shape, method = options.case.removesuffix("+ckpt").split("/")
    folder = Path(options.work)
    parts = folder / shape
    if not parts.exists():  # in a process of its own, so that building the parts is not measured
        subprocess.run([sys.executable, "-c", _MAKE_PARTS, str(parts), *map(str, sum(SHAPES[shape], ()))], check=True)
    rows = options.rows * options.micro_batches * options.steps
    write_rows(folder, rows, options.words)
    recipe = load_recipe(
        [
            "model=none",
            f"experiment.name=memory-{shape}-{method}",
            f"model.language_model={parts / 'lm'}",
            f"model.vision_tower={parts / 'tower'}",
            f"data.data_path={folder / 'rows.json'}",
            f"data.image_folder={folder}",
            *METHODS[method],
            f"training.output_dir={folder / 'out' / options.case.replace('/', '-')}",
            "training.overwrite_output_dir=true",
            f"training.per_device_train_batch_size={options.rows}",
            f"training.global_batch_size={options.rows * options.micro_batches}",
            f"training.max_steps={options.steps}",
            f"training.activation_checkpointing={options.case.endswith('+ckpt')}",
            "training.save_strategy=no",
            "training.dataloader_num_workers=0",
            "training.group_by_image=false",
            "training.share_prefixes=false",
        ]
    )
    import torch
    from transformers import TrainerCallback

    from vir_hf.budget import hardware
    from vir_hf.budget import plan as memory
    from vir_hf.training import run as training

    has_cuda = torch.cuda.is_available()
    measured: dict[str, int] = {}
    cpu_seconds: list[float] = []

    class Meter(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if has_cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # the resident peak starts anew
                measured["ready"] = resident("VmRSS")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            cpu_seconds.append(time.process_time())
            measured["peak"] = torch.cuda.max_memory_allocated() if has_cuda else resident("VmHWM")

    if not has_cuda:
        if options.threshold != 0:
            hardware.return_freed_tensors(*([options.threshold * 1024] if options.threshold else []))
        measured["process"] = resident("VmRSS")
    start = time.perf_counter()
    training.train(recipe, callbacks=[Meter()])
    seconds = time.perf_counter() - start
    predicted = memory.plan(recipe, gpu=None if has_cuda else "cpu", dataset_statistics=statistics_of(recipe))
    estimate = predicted.estimate
    return {
        "case": options.case,
        "device": "cuda" if has_cuda else "cpu",
        "predicted": estimate.peak if has_cuda else estimate.required,
        "measured": measured["peak"],
        "before_model": measured.get("process"),
        "before_first_step": measured.get("ready"),
        "tokens": predicted.batch.tokens,
        "parts": estimate.parts,
        "moments": estimate.moments,
        "seconds": seconds,
        # After the first step, which also builds the optimizer's state.
        "cpu_seconds_a_step": (cpu_seconds[-1] - cpu_seconds[0]) / (len(cpu_seconds) - 1) if cpu_seconds[1:] else None,
    }


def statistics_of(recipe: Any) -> Any:
    """Lengths of the rows, encoded as training encodes them."""
    from vir_hf.data.sources import load_recipe_rows
    from vir_hf.data.statistics import DatasetStatistics
    from vir_hf.model.build import build
    from vir_hf.rows.encoding import encode_row

    _, processor = build(recipe.model.language_model, recipe.model.vision_tower, recipe.model.template)
    encodings = [encode_row(row, processor) for row in load_recipe_rows(recipe)]
    lengths = [(len(one["input_ids"]), 1, sum(label >= 0 for label in one["labels"])) for one in encodings]
    return DatasetStatistics.of_lengths(lengths, max_length=recipe.training.max_length)


def resident(field: str) -> int:
    """Bytes of this process that lie in memory now (VmRSS), or lay at most (VmHWM)."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(field):
            return int(text.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


_WORDS = "a the man dog red street table of on in is with image photo near large small people two".split()


def write_rows(folder: Path, num_rows: int, num_words: int) -> None:
    """Rows of one length, a picture each."""
    from PIL import Image

    draw = random.Random(0)
    rows = []
    for number in range(num_rows):
        name = f"{number}.jpg"
        Image.effect_noise((336, 336), 80).convert("RGB").save(folder / name)
        turns = [
            {"from": "human", "value": "<image>\n" + " ".join(draw.choices(_WORDS, k=num_words // 4))},
            {"from": "gpt", "value": " ".join(draw.choices(_WORDS, k=num_words - num_words // 4))},
        ]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


_MAKE_PARTS = '''
import sys
from pathlib import Path
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)
folder = Path(sys.argv[1])
h, i, layers, heads, kv, vocabulary, vh, vi, vl, vheads = map(int, sys.argv[2:])
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
words = """A chat between curious user and an artificial intelligence assistant The gives helpful detailed polite answers to
the s questions USER ASSISTANT a man dog red street table of on in is with image photo near large small people two""".split()
ids = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", "<pad>", ".", ":", "'", ",", *words]))}
tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                        pad_token="<pad>").save_pretrained(folder / "lm")
with torch.device(device):
    LlamaForCausalLM(LlamaConfig(hidden_size=h, intermediate_size=i, num_hidden_layers=layers, num_attention_heads=heads,
                                 num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=4096,
                                 bos_token_id=1, eos_token_id=2, pad_token_id=3)).save_pretrained(folder / "lm")
    CLIPVisionModel(CLIPVisionConfig(hidden_size=vh, intermediate_size=vi, num_hidden_layers=vl, num_attention_heads=vheads,
                                     image_size=336, patch_size=14)).save_pretrained(folder / "tower")
CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(folder / "tower")
'''

if __name__ == "__main__":
    sys.exit(main())
