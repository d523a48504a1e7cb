"""One training step, stock TRL with transformers' LLaVA against vir_hf: same weights, rows, labels, adapter and dtype.

    python benchmarks/train_step.py --model smollm135m --steps 3
    python benchmarks/train_step.py --model llava7b --method qlora --json step.json     # on a CUDA GPU

The sides run in turn, each in a process of its own, so that peak memory is that side's alone. Both compute the loss of the
same labels and the benchmark stops if the losses differ. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# width, intermediate, layers, heads, kv heads, vocabulary / width, intermediate, layers, heads
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "smollm135m": ((576, 1536, 30, 9, 3, 49216), (1024, 4096, 24, 16)),
    "tinyllama": ((2048, 5632, 22, 32, 4, 32064), (1024, 4096, 24, 16)),
    "llava7b": ((4096, 11008, 32, 32, 32, 32064), (1024, 4096, 24, 16)),
    "tiny": ((64, 128, 4, 4, 2, 32064), (64, 128, 4, 4)),
}
SIDES = ("stock", "vir_hf", "vir_hf+cache")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="smollm135m")
    parser.add_argument("--depth", type=float, default=1.0, help="share of the layers, for slow machines")
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--rows-per-image", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=0, help="rows a micro-batch; all rows of a step by default")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round, after one of warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="how often the sides take turns")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--checkpointing", choices=("same", "off"), default="same", help="off: ours runs without it")
    parser.add_argument("--data", help="a LLaVA JSON file; rows of the same lengths are generated without one")
    parser.add_argument("--image-folder")
    parser.add_argument("--tokenizer", help="a tokenizer folder; a word-level one is made without it")
    parser.add_argument("--json", help="write the figures to a file, or - for standard output")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("RESULT " + json.dumps(run_side(options)), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as work:
        prepare(options, Path(work))
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
        for _ in range(options.rounds):
            for side in options.sides:
                results[side].append(run_in_process(side, work))
    return report(options, results)


def run_in_process(side: str, work: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--work", work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Rows, pictures and a tokenizer that both sides read."""
    from PIL import Image

    draw = random.Random(0)
    num_rows = options.rows * (options.steps + 1)
    if options.data:
        raw = json.loads(Path(options.data).read_text(encoding="utf-8"))
        raw = [row for row in raw if isinstance(row.get("image"), str)]
        folder = Path(options.image_folder or Path(options.data).parent)
        by_image: dict[str, list[dict[str, Any]]] = {}
        for row in raw:
            by_image.setdefault(row["image"], []).append(row)
        groups = [rows[: options.rows_per_image] for rows in by_image.values() if len(rows) >= options.rows_per_image]
        rows = [row for group in groups for row in group][:num_rows]
        if len(rows) < num_rows:
            raise SystemExit(
                f"{options.data} has {len(rows)} rows with {options.rows_per_image} to a picture, {num_rows} wanted"
            )
    else:
        words = "a the man dog red street table of on in is with image photo near large small people two".split()
        rows, folder = [], work / "images"
        folder.mkdir()
        for number in range(num_rows):
            name = f"{number // options.rows_per_image}.jpg"
            if not (folder / name).exists():
                Image.effect_noise((640, 480), 80).convert("RGB").save(folder / name)
            turns: list[dict[str, str]] = []
            for turn in range(4):  # LLaVA-Instruct's conversations: about 376 text tokens a row
                question = ("<image>\n" if turn == 0 else "") + " ".join(draw.choices(words, k=12)) + "?"
                turns += [{"from": "human", "value": question}]
                turns += [{"from": "gpt", "value": " ".join(draw.choices(words, k=60)) + "."}]
            rows.append({"id": str(number), "image": name, "conversations": turns})
    (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (work / "settings.json").write_text(json.dumps({"image_folder": str(folder)}), encoding="utf-8")
    if not options.tokenizer:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
        for row in rows:
            for turn in row["conversations"]:
                for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(turn["value"]):
                    vocabulary.setdefault(word, len(vocabulary))
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        ).save_pretrained(work / "tokenizer")


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Build the model, train, and return this side's figures."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    work = Path(options.work)
    settings = json.loads((work / "settings.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or work / "tokenizer")
    from transformers import CLIPImageProcessorPil

    from vir_hf import LlavaProcessor, load_llava_dataset

    square = {"height": 336, "width": 336}
    processor = LlavaProcessor.from_components(
        tokenizer, CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=square), "vicuna_v1"
    )
    model = make_model(options, processor)
    rows = load_llava_dataset(work / "rows.json", settings["image_folder"], decode_images=False)
    run = run_stock if options.side == "stock" else run_ours
    return run(options, model, processor, rows, work)


def make_model(options: argparse.Namespace, processor: Any) -> Any:
    """The same random weights on both sides, LoRA on the language model's linear layers, a full projector."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        BitsAndBytesConfig,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from vir_hf import LlavaForCausalLM

    (width, inner, layers, heads, kv_heads, vocabulary), (v_width, v_inner, v_layers, v_heads) = SHAPES[options.model]
    vocabulary = max(vocabulary, -(-len(processor.tokenizer) // 64) * 64)
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=max(1, round(layers * options.depth)),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=v_width,
            intermediate_size=v_inner,
            num_hidden_layers=max(2, round(v_layers * options.depth)),
            num_attention_heads=v_heads,
            image_size=336,
            patch_size=14,
        ),
        image_token_index=processor.image_token_id,
    )
    has_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if has_cuda else torch.float32
    model_class = LlavaForConditionalGeneration if options.side == "stock" else LlavaForCausalLM
    folder = Path(options.work) / "model"
    if options.method == "qlora":
        if not folder.exists():
            with torch.device("cuda" if has_cuda else "cpu"):
                torch.set_default_dtype(dtype)
                LlavaForConditionalGeneration(config).save_pretrained(folder)
                torch.set_default_dtype(torch.float32)
        from vir_hf.model.quantization import NOT_QUANTIZED

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(NOT_QUANTIZED),
        )
        model = model_class.from_pretrained(
            folder, dtype=dtype, quantization_config=quantization, device_map={"": 0} if has_cuda else None
        )
    else:
        torch.set_default_dtype(dtype)
        with torch.device("cuda" if has_cuda else "cpu"):
            torch.manual_seed(0)
            model = model_class(config)
        torch.set_default_dtype(torch.float32)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["model.multi_modal_projector"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    return get_peft_model(model, lora)


def sft_arguments(options: argparse.Namespace, work: Path, **changes: Any) -> dict[str, Any]:
    import torch

    has_cuda = torch.cuda.is_available()
    return {
        "output_dir": str(work / "out"),
        "max_steps": options.steps + 1,
        "learning_rate": 1e-4,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": not has_cuda,
        "bf16": has_cuda,
        "activation_checkpointing": True,
        "dataloader_num_workers": 0,
        "max_length": None,
        "disable_tqdm": True,
        "seed": 0,
        "remove_unused_columns": False,
        **changes,
    }


class Clock:
    """Wall seconds of every optimizer step, as a transformers callback."""

    def __new__(cls) -> Any:
        import torch
        from transformers import TrainerCallback

        class _Clock(TrainerCallback):
            def __init__(self) -> None:
                self.seconds: list[float] = []

            def _now(self) -> float:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                return time.perf_counter()

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.last = self._now()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                now = self._now()
                self.seconds.append(now - self.last)
                self.last = now

        return _Clock()


def encoded_collator(processor: Any) -> Any:
    """Stock TRL's way to a batch (its processor call, padding, all pictures), with our labels, so that losses compare."""
    import torch

    from vir_hf import LlavaDataCollator, open_image

    padded = LlavaDataCollator(
        processor, max_length=None, padding_free=False, share_prefixes=False, preprocess=torch.Tensor
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [open_image(image) for row in rows for image in row["images"]]
        text = [row | {"images": []} for row in rows]
        del text
        batch = padded._pad([padded._encode(row, []) for row in rows])
        batch.pop("image_indices", None)
        batch["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch

    return collate


def run_stock(options: argparse.Namespace, model: Any, processor: Any, rows: Any, work: Path) -> dict[str, Any]:
    """TRL's own trainer on transformers' own class."""
    from trl import SFTConfig, SFTTrainer

    size = options.micro_batch or options.rows
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **sft_arguments(
                options,
                work,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=options.rows // size,
            )
        ),
        train_dataset=rows,
        processing_class=processor,
        data_collator=encoded_collator(processor),
        callbacks=[clock],
    )
    # The same rows in the same steps as ours.
    from torch.utils.data import SequentialSampler

    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    trainer.train()
    return figures(options, clock.seconds, trainer, rows, processor, model)


def run_ours(options: argparse.Namespace, model: Any, processor: Any, rows: Any, work: Path) -> dict[str, Any]:
    """`LlavaTrainer`: padding-free, shared prefixes, frozen tower once a picture, supervised positions."""
    import torch
    from trl import SFTConfig

    from vir_hf import LlavaDataCollator
    from vir_hf.batches.sampling import RowSize, StepSampler
    from vir_hf.kernels.fused_lora import fuse_lora
    from vir_hf.kernels.lean_layers import make_lean
    from vir_hf.training.trainer import LlavaTrainer

    class InOrder(StepSampler):
        def steps(self) -> list[list[int]]:
            return [
                list(range(start, start + self.rows_per_step))
                for start in range(0, len(self.sizes), self.rows_per_step)
            ]

    lookup = None
    if options.side == "vir_hf+cache":
        from vir_hf.images.opening import open_image

        tower = model.base_model.model.model
        features: dict[str, torch.Tensor] = {}
        for row in rows:
            for image in row["images"]:
                if image["path"] not in features:
                    pixels = processor.image_processor([open_image(image)], return_tensors="pt")["pixel_values"]
                    features[image["path"]] = tower.encode_images(pixels.to(model.device))[0].cpu()

        def lookup(image: dict[str, Any]) -> torch.Tensor | None:
            return features.get(image["path"])

    fuse_lora(model)
    make_lean(model.base_model.model.model.language_model)
    clock = Clock()
    size = options.micro_batch or options.rows
    trainer = LlavaTrainer(
        model=model,
        args=SFTConfig(
            **sft_arguments(
                options,
                work,
                per_device_train_batch_size=size,
                activation_checkpointing=options.checkpointing == "same",
                ddp_find_unused_parameters=False,
            )
        ),
        train_dataset=rows,
        processing_class=processor,
        data_collator=LlavaDataCollator(processor, max_length=None, with_row_ids=True, feature_lookup=lookup),
        step_sampler=InOrder([RowSize(1)] * len(rows), options.rows, micro_batch_rows=size, balance_tokens=False),
        callbacks=[clock],
    )
    trainer.train()
    return figures(options, clock.seconds, trainer, rows, processor, model)


def figures(
    options: argparse.Namespace, seconds: list[float], trainer: Any, rows: Any, processor: Any, model: Any
) -> dict[str, Any]:
    import torch

    from vir_hf import encode_row

    encoded = [encode_row(row, processor) for row in rows.select(range(options.rows * (options.steps + 1)))]
    supervised = sum(label != -100 for row in encoded[options.rows :] for label in row["labels"][1:])
    tokens = sum(len(row["input_ids"]) for row in encoded[options.rows :])
    timed = sorted(seconds[1:])
    median = timed[len(timed) // 2]
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds_per_step": median,
        "rows_per_second": options.rows / median,
        "supervised_tokens_per_second": supervised / len(timed) / median,
        "tokens_per_second": tokens / len(timed) / median,
        "peak_memory_gib": peak / 2**30,
    }
    totals = getattr(trainer, "totals", None)
    if totals is not None and totals.computed_tokens:
        result["packing_efficiency"] = totals.real_tokens / totals.computed_tokens
        every = sum(len(row["input_ids"]) for row in encoded)
        result["sharing_ratio"] = every / totals.computed_tokens
    else:
        longest = [
            max(len(row["input_ids"]) for row in encoded[i : i + options.rows])
            for i in range(0, len(encoded), options.rows)
        ]
        result["packing_efficiency"] = sum(len(row["input_ids"]) for row in encoded) / (sum(longest) * options.rows)
        result["sharing_ratio"] = 1.0
    useful = model_flops(model, encoded[options.rows :]) / len(timed)
    result["model_tflops_per_second"] = useful / median / 1e12
    result["matmul_ceiling_tflops"] = matmul_ceiling()
    result["model_flop_utilisation"] = result["model_tflops_per_second"] / result["matmul_ceiling_tflops"]
    return result


def model_flops(model: Any, encoded: list[dict[str, list[int]]]) -> float:
    """FLOPs the rows need one by one: forward and activation gradient of the language model, the tower forward once a row.

    A frozen weight needs no weight gradient, so a LoRA step costs 4 FLOPs a weight and token, not 6. Nothing is added for
    recomputation, nor taken off for what is shared: it is the work of the plain method that both sides get done.
    """
    base = model.get_base_model()
    text = sum(p.numel() for n, p in base.named_parameters() if "language_model.layers" in n and "lora_" not in n)
    if any(type(module).__name__ == "Linear4bit" for module in base.modules()):
        text = sum(
            module.in_features * module.out_features
            for name, module in base.named_modules()
            if type(module).__name__ == "Linear4bit" and "language_model" in name
        )
    vision = sum(p.numel() for n, p in base.named_parameters() if "vision_tower" in n)
    config = base.config.text_config
    total = 0.0
    for row in encoded:
        length = len(row["input_ids"])
        attention = 2 * 2 * length * length / 2 * config.hidden_size * config.num_hidden_layers
        total += 2 * (2 * text * length + attention) + 2 * vision * 577
    return total


def matmul_ceiling() -> float:
    """TFLOP/s of a large matrix product in the run's dtype on this machine, now."""
    import torch

    has_cuda = torch.cuda.is_available()
    size, repeats = (8192, 20) if has_cuda else (1536, 4)
    a = torch.randn(
        size, size, device="cuda" if has_cuda else "cpu", dtype=torch.bfloat16 if has_cuda else torch.float32
    )
    a @ a
    if has_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    if has_cuda:
        torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> int:
    """Print one table; fail if the sides did not compute the same losses."""
    import platform

    first = {side: runs[0] for side, runs in results.items()}
    reference = next(iter(first.values()))["losses"]
    tolerance = 2e-2 if options.method == "qlora" or "cuda" in os.environ.get("VIR_HF_DEVICE", "") else 1e-3
    worst = max(
        (abs(a - b) / abs(b) for result in first.values() for a, b in zip(result["losses"], reference, strict=True)),
        default=0.0,
    )
    columns = (
        ("s/step", "seconds_per_step", "{:.2f}"),
        ("rows/s", "rows_per_second", "{:.3f}"),
        ("supervised tok/s", "supervised_tokens_per_second", "{:.1f}"),
        ("real/computed", "packing_efficiency", "{:.3f}"),
        ("sharing", "sharing_ratio", "{:.2f}"),
        ("MFU", "model_flop_utilisation", "{:.2f}"),
        ("peak GiB", "peak_memory_gib", "{:.2f}"),
    )
    print(
        f"\n{options.model} x{options.depth:g} depth, {options.method}, {options.rows} rows a step, {platform.machine()}"
    )
    print(f"largest relative difference of the losses: {worst:.1e}")
    print("| side | " + " | ".join(title for title, _, _ in columns) + " | speed-up |")
    print("|---" * (len(columns) + 2) + "|")
    best = {side: min(runs, key=lambda run: run["seconds_per_step"]) for side, runs in results.items()}
    base = best[options.sides[0]]["seconds_per_step"]
    for side, result in best.items():
        cells = [form.format(result[key]) for _, key, form in columns]
        print(f"| {side} | " + " | ".join(cells) + f" | {base / result['seconds_per_step']:.2f}x |")
    if options.json:
        text = json.dumps({"options": vars(options), "results": results, "loss_difference": worst}, indent=2)
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    if worst > tolerance:
        print(
            f"the sides do not compute the same loss (more than {tolerance:.0e} apart): the timings mean nothing",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
