"""From rows to a plan: every row's size, measured once and kept, and the sampler that makes steps of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

import vir_hf
from vir_hf.batches.collator import shareable_length
from vir_hf.batches.sampling import RowSize, StepSampler
from vir_hf.data.cache import flat_batches
from vir_hf.data.located import MIXTURE, BadRow, BadRowPolicy
from vir_hf.errors import DataError
from vir_hf.images.folder import file_stamp
from vir_hf.images.identity import picture_identity
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.recipe.rules import global_batch_size
from vir_hf.rows.encoding import encode_with_images
from vir_hf.rows.image_lengths import image_lengths

if TYPE_CHECKING:
    from datasets import Dataset

    from vir_hf.recipe.load import Recipe

# Below this many rows one process measures them sooner than several start.
_ROWS_PER_PROCESS = 20_000
# Part of the cache's name: raised when what is measured, or how rows are encoded, changes.
_MEASURE_VERSION = 5


def plan_steps(
    recipe: Recipe, sizes: list[RowSize], processor: LlavaProcessor, world_size: int, rank: int
) -> StepSampler:
    """Return this rank's plan of every optimizer step over rows of these sizes.

    Raises:
        RecipeError: the global batch is no multiple of what the layout computes at once.
    """
    training = recipe.training
    budget = training.max_tokens_per_batch
    rows_per_step = global_batch_size(recipe, world_size)
    return StepSampler(
        sizes,
        rows_per_step,
        micro_batch_rows=None
        if budget
        else min(training.per_device_train_batch_size or 1, rows_per_step // world_size),
        max_tokens_per_batch=budget,
        num_replicas=world_size,
        rank=rank,
        seed=training.seed if training.data_seed is None else training.data_seed,
        group_by="image" if training.group_by_image else None,
        balance_tokens=training.balance_tokens,
        shares_images=shares_prefixes(recipe),
        drop_last=bool(training.dataloader_drop_last),
    )


def shares_prefixes(recipe: Recipe) -> bool:
    """Whether rows of one micro-batch that begin with the same picture keep its tokens once."""
    return bool(recipe.training.padding_free and recipe.training.share_prefixes is not False)


def size_of_row(row: dict[str, Any], processor: LlavaProcessor, max_length: int | None) -> RowSize:
    """Return what planning needs to know of a row; of pictures at most the header is read.

    Raises:
        DataError: the row cannot be encoded.
    """
    encoding, images = encode_with_images(row, processor, max_length=max_length)
    if not images:
        return RowSize(len(encoding["input_ids"]))
    key = picture_identity(images[0])
    (first,) = image_lengths(images[:1], processor)
    prefix = _prefix_key(encoding, processor.image_token_id, first)
    return RowSize(len(encoding["input_ids"]), len(images), key if isinstance(key, str) else None, prefix, first)


def _prefix_key(encoding: dict[str, Any], image_token_id: int, num_first: int) -> str | None:
    """Return what the ids before the first picture have in common with those of rows that share it, as the collator does."""
    start = encoding["input_ids"].index(image_token_id)
    if start + num_first > shareable_length(encoding["labels"]):
        return None
    return hashlib.sha256(repr(encoding["input_ids"][:start]).encode()).hexdigest()[:16]


def measure_rows(
    rows: Dataset, processor: LlavaProcessor, recipe: Recipe, bad_rows: list[BadRow]
) -> tuple[Dataset, list[RowSize]]:
    """Return the rows that can be encoded and their sizes, from text and images; no picture is decoded.

    One process a node measures, with all its cores, and keeps the result beside the rows' own cache; the others read it.

    Args:
        bad_rows: receives the rows left out under `data.on_bad_row=skip`, with their numbers among `rows`.

    Raises:
        DataError: a row that cannot be encoded (nothing to learn, too long for its pictures) under `data.on_bad_row=raise`.
    """
    max_length = recipe.training.max_length

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {**dataclasses.asdict(size_of_row(row, processor, max_length)), "reason": None}
        except DataError as error:
            return {**dataclasses.asdict(RowSize(0)), "reason": str(error)}

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc = min(cores, len(rows) // _ROWS_PER_PROCESS)
    with PartialState().local_main_process_first():
        measured = rows.map(
            measure,
            remove_columns=rows.column_names,
            num_proc=num_proc if num_proc > 1 else None,
            # datasets cannot hash a tokenizer to the same value twice, so the cache is named by what sizes depend on.
            new_fingerprint=_fingerprint(rows, processor, max_length),
            desc="measuring rows",
        )
    reasons = measured["reason"]
    bad = [number for number, reason in enumerate(reasons) if reason is not None]
    if bad:
        source = recipe.data.data_path or MIXTURE
        found = [BadRow(source, number, str(rows[number]["id"]), "unusable", reasons[number]) for number in bad]
        policy = BadRowPolicy(recipe.data.on_bad_row, recipe.data.on_bad_image, recipe.data.max_bad_fraction)
        policy.enforce(found, len(rows), source)
        bad_rows += found
        good = [number for number, reason in enumerate(reasons) if reason is None]
        rows, measured = rows.select(good), measured.select(good)
    columns = [measured[name] for name in ("num_tokens", "num_images", "image_key", "prefix_key", "image_tokens")]
    return rows, [RowSize(*values) for values in zip(*columns, strict=True)]


def _fingerprint(rows: Dataset, processor: LlavaProcessor, max_length: int | None) -> str:
    tokenizer = processor.tokenizer
    content = [
        _MEASURE_VERSION,
        vir_hf.__version__,
        rows._fingerprint,
        processor.chat_template,
        processor.template,
        repr(processor.views),
        None if processor.views.is_fixed else _stamps_of_images(rows),
        max_length,
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        if getattr(tokenizer, "is_fast", False)
        else sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token,
        tokenizer.bos_token,
    ]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]


def _stamps_of_images(rows: Dataset) -> str:
    """Return a digest of size and time of every image file of the rows: another file of the same name may have other views."""
    places: dict[str, None] = {}
    for _, table in flat_batches(rows, ["images"]):
        images = table.column("images").combine_chunks().flatten()
        places.update(dict.fromkeys(images.field("path").drop_null().to_pylist()))
    return hashlib.sha256(repr([file_stamp(place) for place in places]).encode()).hexdigest()
