"""The proof of an export: opened in a process of its own, it has the logits and the greedy answers of the run it is of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.images.opening import open_image
from vir_hf.inference import Answerer, Question
from vir_hf.model.for_use import load_run

WITNESS = Path(__file__).with_name("witness.py")
NUM_TOKENS = 12
QUESTION = "What is in the image?"
# How far logits may be from ours, in units of their own spread over the vocabulary, by what the weights are kept in.
LIMITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_LARGE = 3_000_000_000  # parameters; such models are compared in the dtype they are kept in, not in fp32
_TIMEOUT_SECONDS = 3600


@dataclass
class Expected:
    """What a run answers: for each image the prompt's ids, the answer's ids and text, and the logits that decided them.

    Attributes:
        dtype: in which it was computed, and in which the export is.
    """

    dtype: str
    device: str
    prompts: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    input_ids: list[list[int]] = field(default_factory=list)
    answer_ids: list[list[int]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Proof:
    """How near an export came.

    Attributes:
        reader: what opened it.
        num_images: how many images were asked about.
        difference: the largest distance of logits, in units of their spread.
        limit: how large it may be.
        num_equal: how many greedy answers are the same text.
    """

    reader: str
    num_images: int
    difference: float
    limit: float
    num_equal: int

    def __str__(self) -> str:
        return (
            f"opened by {self.reader}: {self.num_equal} of {self.num_images} greedy answers are ours, logits differ by "
            f"{self.difference:.1e} of their spread (limit {self.limit:g})"
        )


def built_in_images(*, square: bool = False) -> list[Image.Image]:
    """Return drawn images: wide, high and square ones, or squares alone."""
    sizes = [(336, 336), (224, 224), (448, 448)] if square else [(400, 240), (200, 330), (336, 336)]
    drawn = []
    for number, (width, height) in enumerate(sizes):
        image = Image.new("RGB", (width, height), ("navy", "beige", "darkgreen")[number])
        draw = ImageDraw.Draw(image)
        draw.ellipse((width // 8, height // 6, width // 2, height * 2 // 3), fill=("gold", "crimson", "white")[number])
        draw.rectangle(
            (width // 2, height // 2, width * 7 // 8, height * 7 // 8), fill=("pink", "teal", "orange")[number]
        )
        drawn.append(image)
    return drawn


def expected_of(
    run: str | os.PathLike[str],
    images: Sequence[str] = (),
    *,
    base: str | None = None,
    revision: str | None = None,
    square: bool = False,
    num_parameters: int = 0,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Any], Any] | None = None,
) -> Expected:
    """Return what a run answers about given or built-in images.

    Args:
        square: ask about squares, for a reader that makes squares in another way: given images are padded to them.
        num_parameters, dtype: of the model; a large one is compared in its own dtype.
        prepare: changes the loaded model, and returns it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = dtype if num_parameters > _LARGE else torch.float32
    model, processor = load_run(run, dtype=chosen, device=device, base=base, revision=revision)
    answerer = Answerer(model if prepare is None else prepare(model), processor)
    expected = Expected(str(chosen).removeprefix("torch."), device)
    opened = [(name, open_image(name)) for name in images] or [
        (f"built-in image {number + 1}", image) for number, image in enumerate(built_in_images(square=square))
    ]
    for name, image in opened:
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        expected.prompts.append(processor.apply_chat_template(turns, add_generation_prompt=True))
        image = _square(image, processor.image_processor.image_mean) if square else image
        expected.images.append(image)
        expected.names.append(name)
        _answer(answerer, image, expected)
    return expected


def _square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), tuple(int(value * 255) for value in mean))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


@torch.no_grad()
def _answer(answerer: Answerer, image: Image.Image, expected: Expected) -> None:
    model, prompt = answerer.model, answerer.encode(Question(QUESTION, [image]))
    device = model.get_input_embeddings().weight.device
    input_ids = torch.tensor([prompt.input_ids], device=device)
    pixels = torch.stack(prompt.pixel_values).to(device, model.dtype)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=pixels,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    answer = output[0, input_ids.shape[1] :]
    logits = model(input_ids=output[:, :-1], attention_mask=torch.ones_like(output[:, :-1]), pixel_values=pixels).logits
    expected.input_ids.append(prompt.input_ids)
    expected.answer_ids.append(answer.tolist())
    expected.answers.append(answerer.processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
    expected.logits.append(logits[0, -len(answer) :].float().cpu())


def prove(
    folder: Path, way: str, expected: Expected, limit: float, *, reader: str, base: str | None = None, **more: Any
) -> Proof:
    """Open an export in a process of its own, without this project, and compare what it answers.

    Args:
        way: a word of the witness: how it opens the folder.
        limit: how far logits may be from ours, in units of their spread.
        reader: what opens it, in words.
        base: of an adapter, where it is not named by the folder.

    Raises:
        RecipeError: it does not open, or answers otherwise; says where.
    """
    with tempfile.TemporaryDirectory(prefix="vir-hf-proof-") as temporary:
        place = Path(temporary)
        images = {
            str(number): torch.from_numpy(np.array(image.convert("RGB")))
            for number, image in enumerate(expected.images)
        }
        save_file(images, place / "images.safetensors")
        cases = [
            {"prompt": prompt, "answer_ids": ids}
            for prompt, ids in zip(expected.prompts, expected.answer_ids, strict=True)
        ]
        job = {
            "way": way,
            "folder": str(folder.resolve()),
            "base": base,
            "dtype": expected.dtype,
            "device": expected.device,
            "num_tokens": NUM_TOKENS,
            "cases": cases,
            "images": str(place / "images.safetensors"),
            "out": str(place / "found.json"),
            "logits": str(place / "logits.safetensors"),
            **more,
        }
        files.write_json(place / "job.json", job)
        _run_witness(place / "job.json", reader)
        found = json.loads((place / "found.json").read_text(encoding="utf-8"))
        logits = load_file(place / "logits.safetensors") if (place / "logits.safetensors").is_file() else {}
    return compare(expected, found, [logits[str(number)] for number in range(len(logits))], limit, reader)


def _run_witness(job: Path, reader: str) -> None:
    # -P: the folder of the program is not searched, so that nothing in it stands for a package.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", str(WITNESS), str(job)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise RecipeError(
            f"the export does not open: {reader} ended with: {lines[-1].strip()[:250]} Nothing was left behind. --no-verify "
            "writes it all the same, for a closer look."
        )


def compare(
    expected: Expected, found: list[dict[str, Any]], logits: Sequence[torch.Tensor], limit: float, reader: str
) -> Proof:
    """Return how near the answers of a reader are to ours.

    A greedy answer may part from ours where two tokens were nearer to each other than the logits may be.

    Raises:
        RecipeError: prompts, logits or answers differ by more; names the image.
    """
    largest, num_equal = 0.0, 0
    for number, name in enumerate(expected.names):
        where = f"{name} ({number + 1} of {len(expected.names)})"
        entry, ours = found[number], expected.logits[number]
        ids = entry.get("input_ids")
        if ids and ids != expected.input_ids[number]:
            raise _differs(
                reader, where, f"its prompt is other tokens: {ids[:8]} ..., ours {expected.input_ids[number][:8]} ..."
            )
        margin = None
        if logits:
            vocabulary = min(ours.shape[-1], logits[number].shape[-1])
            ours, theirs = ours[:, :vocabulary], logits[number][:, :vocabulary]
            spread = ours.std(dim=-1).clamp_min(1e-6)
            differences = ((ours - theirs).abs().amax(dim=-1) / spread).nan_to_num(nan=float("inf"))
            step = int(differences.argmax())
            largest = max(largest, float(differences[step]))
            if largest > limit:
                raise _differs(
                    reader, where, f"logits differ by {largest:.2g} of their spread at token {step}, limit {limit:g}"
                )
            top = ours.topk(2, dim=-1).values
            margin = float(((top[:, 0] - top[:, 1]) / spread).min())
        if entry["answer"] is None:  # read from the logits alone
            num_equal += bool((ours.argmax(-1) == theirs.argmax(-1)).all())
            continue
        is_equal = _whole(entry["answer"]) == _whole(expected.answers[number])
        num_equal += is_equal
        if not is_equal and (margin is None or margin > 2 * limit):
            raise _differs(
                reader, where, f"it answers {entry['answer'].strip()[:60]!r}, the run {expected.answers[number][:60]!r}"
            )
    return Proof(reader, len(expected.names), largest, limit, num_equal)


def _whole(answer: str) -> str:
    """An answer without a character that the last token cuts in two: transformers writes U+FFFD for it, others hold it back."""
    return answer.strip().rstrip("\ufffd ")


def _differs(reader: str, where: str, what: str) -> RecipeError:
    return RecipeError(
        f"the export answers otherwise than the run, {where}, opened by {reader}: {what}. Nothing was left behind. "
        "--no-verify writes it all the same, for a closer look."
    )
