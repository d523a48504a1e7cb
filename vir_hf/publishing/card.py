"""The model card of a run: only what its recipe and its measurements say, with code that loads it."""

# Over 400 lines: a card is one text, written from top to bottom.

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image, ImageDraw, ImageFont

from vir_hf import __version__

TAG = "vir-hf"
ASSETS = "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_FILE = re.compile(r"\.(jsonl?|parquet|arrow|csv|zip|tar|gz)$")


@dataclass
class RunFacts:
    """What a finished run says about itself, read from its folder.

    Attributes:
        recipe: `recipe.yaml`.
        metrics: `metrics.json`.
        evaluation: `evaluation.json`, or nothing if nothing was measured: `{"results": [{"dataset", "metric", "value",
            "num_rows"}]}`.
        samples: `samples.json`, or nothing: `[{"image", "question", "before", "after"}]` about held-out pictures.
        is_adapter: an adapter on a base, or a whole model.
        has_own_base: the base lies in the folder `base/` of the same repository.
        model_type: `llava`, or `vir_llava` for a projector that transformers does not know.
        adapter_base: the base that the adapter's own config names.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    is_adapter: bool = False
    has_own_base: bool = False
    model_type: str = "llava"
    adapter_base: str | None = None

    @classmethod
    def read(cls, folder: Path) -> RunFacts:
        """Return the facts of a run's folder; a file that is not there says nothing."""
        recipe = folder / "recipe.yaml"
        is_adapter = (folder / "adapter_config.json").is_file()
        config = _json(folder / ("base/config.json" if is_adapter else "config.json"))
        return cls(
            recipe=(yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}) if recipe.is_file() else {},
            metrics=_json(folder / "metrics.json"),
            evaluation=_json(folder / "evaluation.json"),
            samples=_json(folder / "samples.json", []),
            is_adapter=is_adapter,
            has_own_base=(folder / "base" / "config.json").is_file(),
            model_type=config.get("model_type", "llava"),
            adapter_base=_json(folder / "adapter_config.json").get("base_model_name_or_path"),
        )

    def value(self, key: str) -> Any:
        """Return a recipe's value by its dotted key, or `None`."""
        section, name = key.split(".")
        return (self.recipe.get(section) or {}).get(name)

    @property
    def base_models(self) -> list[str]:
        """The Hub ids this model comes from; local folders are not named."""
        names = [self.value(f"model.{key}") for key in ("name_or_path", "language_model", "vision_tower")]
        return [name for name in dict.fromkeys(names) if is_hub_id(name)]

    @property
    def datasets(self) -> list[str]:
        """The Hub ids of the training data; local files are not named."""
        sources = self.value("data.sources") or []
        paths = [source.get("path") if isinstance(source, Mapping) else source for source in sources]
        return [path for path in dict.fromkeys([self.value("data.data_path"), *paths]) if is_hub_id(path)]


def is_hub_id(name: Any) -> bool:
    """Return whether a name can only be one of the Hub's: `user/name`, neither a file nor a folder here."""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or _DATA_FILE.search(name):
        return False
    return not Path(name).exists()


def make_card(
    facts: RunFacts, repo_id: str, *, licence: str | None = None, samples_licence: str | None = None
) -> ModelCard:
    """Return the card of a run.

    Args:
        repo_id: where it will lie; stands in the code.
        licence: of the model, as the Hub writes it (`apache-2.0`); not stated if `None`.
        samples_licence: of the sample pictures; without it the panel is shown without its pictures.
    """
    text = "\n\n".join(
        part
        for part in (
            f"# {repo_id.split('/')[-1]}",
            _what_it_is(facts),
            "## How to use it\n\n" + usage(facts, repo_id),
            "## How it was trained\n\n" + _training(facts),
            _evaluation(facts),
            _samples(facts, samples_licence),
            "## Limits\n\n" + _limits(facts, licence),
        )
        if part
    )
    return ModelCard(f"---\n{_metadata(facts, repo_id, licence).to_yaml()}\n---\n\n{text}\n")


def _metadata(facts: RunFacts, repo_id: str, licence: str | None) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=re.sub(r"[^\w.-]+", "-", str(result["dataset"])).lower(),
            dataset_name=str(result["dataset"]),
            metric_type=re.sub(r"[^\w.-]+", "_", str(result["metric"])).lower(),
            metric_name=str(result["metric"]),
            metric_value=result["value"],
        )
        for result in facts.evaluation.get("results", [])
    ]
    values: dict[str, Any] = {
        "pipeline_tag": "image-text-to-text",
        "library_name": "peft" if facts.is_adapter else "transformers",
        "license": licence or "other",
        "tags": [TAG, "llava", "vision-language", "trl", "sft", *(["lora"] if facts.is_adapter else [])],
        "language": None,
    }
    if licence is None:
        values["license_name"] = "not-stated"
    if facts.base_models:
        values["base_model"] = facts.base_models
        if facts.is_adapter and not facts.has_own_base:
            values["base_model_relation"] = "adapter"
    if facts.datasets:
        values["datasets"] = facts.datasets
    if results:
        values |= {"model_name": repo_id.split("/")[-1], "eval_results": results}
    return ModelCardData(**values)


def _what_it_is(facts: RunFacts) -> str:
    parts = f"an adapter ({_adapter_words(facts)}) for a" if facts.is_adapter else "a"
    bases = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in facts.base_models)
    lines = [f"This is {parts} vision-language model: it reads pictures and text and answers in text."]
    if bases:
        lines.append(f"It was made from {bases}.")
    lines.append(
        f"Trained with vir_hf {__version__}, on TRL and transformers, by visual instruction tuning as LLaVA does."
    )
    return " ".join(lines)


def _adapter_words(facts: RunFacts) -> str:
    rank = facts.value("lora.r")
    return f"LoRA of rank {rank}, and the projector" if rank else "LoRA, and the projector"


def usage(facts: RunFacts, repo_id: str) -> str:
    """Return the card's section with code: transformers, vir_hf and vLLM. A test runs the first two as they stand."""
    return "\n\n".join([_with_transformers(facts, repo_id), _with_vir_hf(repo_id), _with_vllm(facts, repo_id)])


def _with_transformers(facts: RunFacts, repo_id: str) -> str:
    is_native = facts.model_type == "llava"
    model_class = "LlavaForConditionalGeneration" if is_native else "AutoModelForImageTextToText"
    trust = "" if is_native else ", trust_remote_code=True"
    own = "" if is_native else " The code of its projector needs transformers 5."
    imports = f"from transformers import AutoProcessor, {model_class}"
    if facts.is_adapter and facts.has_own_base and not is_native:
        # transformers' Auto classes put the adapter on its base by themselves, and would look for it in the base's folder.
        imports = f"import peft  # puts the adapter on its base; without it the base alone would answer\n{imports}"
        load = f'model = {model_class}.from_pretrained("{repo_id}"{trust})'
    elif facts.is_adapter:
        base = facts.adapter_base or facts.value("model.name_or_path") or "BASE"
        source = f'"{repo_id}", subfolder="base"' if facts.has_own_base else f'"{base}"'
        imports = f"from peft import PeftModel\n{imports}"
        load = f'base = {model_class}.from_pretrained({source}{trust})\nmodel = PeftModel.from_pretrained(base, "{repo_id}")'
    else:
        load = f'model = {model_class}.from_pretrained("{repo_id}"{trust})'
    return f"""### transformers

```python
from PIL import Image
{imports}

{load}
processor = AutoProcessor.from_pretrained("{repo_id}"{trust})

messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is it?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open("photo.jpg"), text=prompt, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
```

`add_special_tokens=False` matters: the chat template writes the beginning of the text itself.{own}"""


def _with_vir_hf(repo_id: str) -> str:
    return f"""### vir_hf

```python
from vir_hf.inference import Answerer

answerer = Answerer.load("{repo_id}")
print(answerer.answer(["photo.jpg"], "What is it?", max_new_tokens=100))
```

In a terminal: `vir-hf chat {repo_id} --image photo.jpg`; in a browser: `vir-hf demo {repo_id}`."""


def _with_vllm(facts: RunFacts, repo_id: str) -> str:
    if facts.model_type != "llava":
        return "### vLLM\n\nNot with this projector: vLLM's LLaVA knows the two-layer MLP only."
    if facts.is_adapter:
        return f"""### vLLM

Merge first, then serve the folder:

```bash
vir-hf merge {repo_id} --out merged
vllm serve merged
```"""
    return f"""### vLLM

An OpenAI-compatible server:

```bash
vllm serve {repo_id}
```"""


def _training(facts: RunFacts) -> str:
    metrics = facts.metrics
    parts = []
    if (facts.value("experiment.name") or "custom") != "custom":
        parts.append(f"Experiment `{facts.value('experiment.name')}`, stage `{facts.value('training.stage')}`.")
    parts.append("The whole recipe is in `recipe.yaml`, every figure in `metrics.json`.")
    keys = ("language_model", "projector", "vision_tower")
    learned = {key: facts.value(f"trainable.{key}") for key in keys}
    rows = [(f"{key.replace('_', ' ')}", how) for key, how in learned.items() if how]
    for label, key in (
        ("template", "model.template"),
        ("pictures are made square by", "model.image_aspect_ratio"),
        ("rows a step", "training.global_batch_size"),
        ("learning rate", "training.learning_rate"),
        ("learning rate of the projector", "training.projector_learning_rate"),
        ("schedule", "training.lr_scheduler_type"),
        ("longest row, tokens", "training.max_length"),
        ("quantisation while training, 4 bit", "quantization.load_in_4bit"),
        ("seed", "training.seed"),
    ):
        if facts.value(key) is not None:
            rows.append((label, facts.value(key)))
    parts.append(_table(("Setting", "Value"), rows))
    parts.append("### Data\n\n" + _data(facts))
    if metrics.get("loss_history"):
        first, last = metrics["loss_history"][0], metrics["loss_history"][-1]
        parts.append(
            f"### Loss\n\n![Training loss over {last['step']} steps]({ASSETS}/loss.png)\n\n"
            f"From {_number(first['loss'])} at step {first['step']} to {_number(last['loss'])} at step {last['step']}."
        )
    if metrics.get("best"):
        best = metrics["best"]
        metric = str(best["metric"]).removeprefix("eval_").replace("_", " ")
        parts.append(
            f"### Which step\n\nThese are the weights of step {metrics['saved_step']} of {metrics['num_steps']}. Evaluation "
            f"during training found step {best['step']} the best: {metric} {_number(best['value'])}."
        )
    parts.append("### Machine\n\n" + _table(("", ""), _machine(metrics)))
    return "\n\n".join(parts)


def _data(facts: RunFacts) -> str:
    metrics = facts.metrics
    rows: list[tuple[str, Any]] = []
    for label, key in (("rows seen", "num_rows"), ("pictures seen", "num_images"), ("tokens", "num_tokens")):
        if metrics.get(key) is not None:
            rows.append((label, f"{metrics[key]:,}"))
    if metrics.get("num_tokens") and metrics.get("num_supervised_tokens") is not None:
        share = metrics["num_supervised_tokens"] / metrics["num_tokens"]
        rows.append(("supervised tokens", f"{metrics['num_supervised_tokens']:,} ({share:.1%})"))
    dropped = metrics.get("dropped_rows") or {}
    rows += [(f"rows left out: {reason}", f"{count:,}") for reason, count in dropped.items()]
    masked = metrics.get("masked_rows")
    if masked is not None:
        rows.append(("rows not learned because a picture could not be opened", f"{len(masked):,}"))
    names = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets)
    head = f"From {names}." if names else "From files that are not on the Hub."
    note = "Rows are counted each time they were seen; pictures and tokens that rows of one batch share, once."
    return f"{head} {note}\n\n{_table(('Data', 'Count'), rows)}" if rows else head


def _machine(metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    if metrics.get("device"):
        count = metrics.get("world_size") or 1
        rows.append(("hardware", f"{count} x {metrics['device']}"))
    if metrics.get("seconds") is not None:
        rows.append(("time", duration(metrics["seconds"])))
    if metrics.get("num_steps") is not None:
        rows.append(("steps", f"{metrics['num_steps']:,}"))
    return rows + [(name, version) for name, version in {"vir_hf": __version__, **metrics.get("versions", {})}.items()]


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _evaluation(facts: RunFacts) -> str:
    results = facts.evaluation.get("results", [])
    if not results:
        return "## Evaluation\n\nNothing was measured on held-out data."
    rows = [(r["dataset"], r["metric"], _number(r["value"]), r.get("num_rows", "")) for r in results]
    return "## Evaluation\n\n" + _table(("Data", "Metric", "Value", "Rows"), rows)


def _samples(facts: RunFacts, samples_licence: str | None) -> str:
    if not facts.samples:
        return ""
    with_pictures = samples_licence is not None
    rows = []
    for sample in facts.samples:
        name = f"{ASSETS}/samples/{Path(str(sample['image'])).name}"
        shown = (f"![]({name})",) if with_pictures else ()
        rows.append((*shown, sample["question"], sample["before"], sample["after"]))
    heads = (*(("Picture",) if with_pictures else ()), "Question", "Before tuning", "After tuning")
    said = f"Pictures: {samples_licence}." if with_pictures else "The pictures are not published."
    return f"## Held-out pictures, before and after\n\n{said}\n\n{_table(heads, rows)}"


def _limits(facts: RunFacts, licence: str | None) -> str:
    lines = [
        "- Answers can be wrong or made up; nothing here was checked for use where that does harm.",
        "- It was tuned on the data above and may have forgotten what its parts could do before.",
    ]
    if not facts.evaluation.get("results"):
        lines.append("- No held-out score was measured, so nothing is known about how well it does on other pictures.")
    if licence is None:
        lines.append(
            "- Its publisher has not stated a licence; the terms of the models and data it was made from apply."
        )
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_loss_curve(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG of the training loss over steps, 800 x 400.

    Args:
        history: `{"step", "loss"}`, in order; at least one.
    """
    points = [(float(entry["step"]), float(entry["loss"])) for entry in history]
    scale, width, height = 2, 800, 400  # drawn twice as large, so that lines are smooth when made small
    left, right, top, bottom = 70, width - 25, 25, height - 50
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(0.0, *losses), max(losses)
    high = high if high > low else low + 1.0
    first, last = min(steps), max(max(steps), min(steps) + 1)
    image = Image.new("RGB", (width * scale, height * scale), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13 * scale)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (step - first) / (last - first) * (right - left)
        y = bottom - (loss - low) / (high - low) * (bottom - top)
        return x * scale, y * scale

    for number in range(5):
        loss = low + (high - low) * number / 4
        y = place(first, loss)[1]
        draw.line([(left * scale, y), (right * scale, y)], fill="#dddddd", width=scale)
        draw.text(((left - 10) * scale, y), f"{loss:.3g}", fill="#444444", font=font, anchor="rm")
        step = first + (last - first) * number / 4
        draw.text((place(step, low)[0], (bottom + 16) * scale), f"{step:.0f}", fill="#444444", font=font, anchor="mm")
    draw.text(((left + right) / 2 * scale, (bottom + 36) * scale), "step", fill="#444444", font=font, anchor="mm")
    draw.text((left * scale, 12 * scale), "training loss", fill="#444444", font=font, anchor="lm")
    line = [place(step, loss) for step, loss in points]
    if len(line) > 1:
        draw.line(line, fill="#2563eb", width=2 * scale, joint="curve")
    for x, y in line if len(line) <= 50 else ():
        draw.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], fill="#2563eb")
    output = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(output, "PNG", optimize=True)
    return output.getvalue()


def _json(path: Path, default: Any = None) -> Any:
    if not path.is_file():
        return {} if default is None else default
    return json.loads(path.read_text(encoding="utf-8"))
