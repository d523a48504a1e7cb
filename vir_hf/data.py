"""Data files -> a dataset of rows `{"id", "messages", "images"}` whose pictures open only when a row is read."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import datasets

from vir_hf.conversations import FATAL_KINDS, PLACEHOLDER, PROBLEM_KINDS, row_problems, to_messages
from vir_hf.errors import DataError, ImageError
from vir_hf.image_folder import ImageFolder
from vir_hf.images import open_image
from vir_hf.row_cache import BadRow, cache_folder, cached_rows, fingerprint, read_bad_rows
from vir_hf.row_files import RowRange, find_data_files, read_rows, split_rows

logger = logging.getLogger(__name__)

ROW_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "messages": datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
            }
        ),
        "images": datasets.List(datasets.Image(decode=False)),
    }
)
Policy = Literal["raise", "skip"]


def load_llava_dataset(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    *,
    decode_images: bool = True,
    streaming: bool = False,
    max_rows: int | None = None,
    allow_urls: bool = False,
    on_bad_row: Policy = "raise",
    on_bad_image: Policy = "raise",
    max_bad_fraction: float = 0.05,
    bad_rows: list[BadRow] | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the rows of LLaVA data as a dataset with the columns `id`, `messages` and `images`.

    Args:
        path: a `.json`, `.jsonl` or `.parquet` file, a directory or glob of them.
        image_folder: where the rows' image paths start: a directory, a `.zip` or a `.tar`. By default the data file's own
            directory.
        decode_images: give PIL images in mode RGB (opened when the row is read), or `{"bytes", "path"}` for `open_image`.
        max_rows: read no more than this many rows from the front.
        allow_urls: let an image be an http(s) URL, fetched when the row is read.
        on_bad_row, on_bad_image: `raise`, or `skip` the row; at most `max_bad_fraction` of all rows.
        bad_rows: a list that receives the rows left out.

    Raises:
        DataError: no data file, malformed JSON (with its line), or rows that cannot be trained on (with number and id).
    """
    files = find_data_files(path)
    folders = _image_folders(files, image_folder, allow_urls)
    if streaming:
        stream = _stream_rows(files, folders, on_bad_row, on_bad_image)
        stream = stream if max_rows is None else stream.take(max_rows)
        return stream.map(OpenImages(allow_urls), batched=True, batch_size=1) if decode_images else stream
    dataset, bad = _load_cached(files, folders, max_rows)
    enforce_policy(bad, len(dataset) + len(bad), os.fspath(path), on_bad_row, on_bad_image, max_bad_fraction)
    if bad_rows is not None:
        bad_rows.extend(bad)
    return dataset.with_transform(OpenImages(allow_urls)) if decode_images else dataset


def _image_folders(
    files: list[str], image_folder: str | os.PathLike[str] | None, allow_urls: bool
) -> list[ImageFolder]:
    if image_folder is not None:
        return [ImageFolder(image_folder, allow_urls=allow_urls)] * len(files)
    return [ImageFolder(os.path.dirname(os.path.abspath(file)), allow_urls=allow_urls) for file in files]


def _load_cached(
    files: list[str], folders: list[ImageFolder], max_rows: int | None
) -> tuple[datasets.Dataset, list[BadRow]]:
    name = fingerprint(files, [folder.identity for folder in folders], max_rows)
    path = cache_folder() / f"rows-{name}.arrow"
    known = read_bad_rows(path)
    if known and any(bad.reference and _is_found(bad, files, folders) for bad in known):
        path.with_suffix(".json").unlink()  # a missing picture has arrived: read the rows again
    path, bad_rows = cached_rows(name, _normalised_rows(files, folders, max_rows))
    dataset = datasets.Dataset.from_file(str(path), info=datasets.DatasetInfo(features=ROW_FEATURES))
    return dataset, bad_rows


def _stream_rows(
    files: list[str], folders: list[ImageFolder], on_bad_row: str, on_bad_image: str
) -> datasets.IterableDataset:
    # All but the last divide evenly over 1, 2, 4, 8 ... and most other numbers of ranks.
    num_parts = next(parts for parts in (960, 96, 8, 1) if parts * len(files) <= 8_000 or parts == 1)
    shards = [
        (file, folder, part) for file, folder in zip(files, folders, strict=True) for part in _parts_of(file, num_parts)
    ]
    return datasets.IterableDataset.from_generator(
        _generate_rows,
        features=ROW_FEATURES,
        gen_kwargs={"shards": shards, "on_bad_row": on_bad_row, "on_bad_image": on_bad_image},
    )


def _parts_of(file: str, max_parts: int) -> list[RowRange]:
    """Return the parts of a file, remembered on disk: finding them takes a pass over it."""
    path = cache_folder() / f"parts-{fingerprint([file], max_parts)}.json"
    try:
        return [RowRange(*part) for part in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        parts = split_rows(file, max_parts)
        temporary = path.with_suffix(f".{os.getpid()}.incomplete")
        temporary.write_text(json.dumps(parts), encoding="utf-8")
        os.replace(temporary, path)
        return parts


def _generate_rows(
    shards: list[tuple[str, ImageFolder, RowRange]], on_bad_row: str, on_bad_image: str
) -> Iterator[dict[str, Any]]:
    for file, folder, part in shards:
        for number, raw in read_rows(file, part):
            row = normalise_row(raw, folder, file, number)
            if isinstance(row, BadRow):
                enforce_policy([row], number + 1, file, on_bad_row, on_bad_image, max_bad_fraction=1.0)
            else:
                yield row


def _is_found(bad: BadRow, files: list[str], folders: list[ImageFolder]) -> bool:
    try:
        return bool(bad.reference and folders[files.index(bad.file)].locate(bad.reference))
    except DataError:
        return False


def _normalised_rows(
    files: Sequence[str], folders: Sequence[ImageFolder], max_rows: int | None = None
) -> Iterator[dict[str, Any] | BadRow]:
    """Yield every raw row of the files as `{"id", "messages", "images"}` with images located, or as a `BadRow`."""
    num_rows = 0
    for file, folder in zip(files, folders, strict=True):
        for number, raw in read_rows(file):
            if max_rows is not None and num_rows >= max_rows:
                return
            num_rows += 1
            yield normalise_row(raw, folder, file, number)


def normalise_row(raw: Any, folder: ImageFolder, file: str, number: int) -> dict[str, Any] | BadRow:
    """Return a raw row as `{"id", "messages", "images"}` with its images located in `folder`, or as a `BadRow`.

    A row without an id is called by its number.
    """
    row_id = str(number)
    reference: Any = None
    try:
        row_id = str(raw["id"]) if isinstance(raw, dict) and raw.get("id") not in (None, "") else row_id
        row = _ordinary_row(raw) or to_messages(raw)
        images = []
        for reference in row["images"]:
            images.append(_locate(reference, folder))
        kind, detail = _text_problem(row, row_id)
        if kind:
            return BadRow(file, number, row_id, kind, detail)
        return {"id": row_id, "messages": row["messages"], "images": images}
    except ImageError as error:
        missing = reference if error.kind == "image_missing" and isinstance(reference, str) else None
        return BadRow(file, number, row_id, error.kind, str(error), missing)
    except DataError:
        kind, detail = next(
            (found for found in row_problems(raw) if found[0] in FATAL_KINDS), ("bad_row", "cannot be read")
        )
        return BadRow(file, number, row_id, kind, f"{detail}. {PROBLEM_KINDS[kind]}")


def _ordinary_row(raw: Any) -> dict[str, Any] | None:
    """Return what `to_messages` returns for a row with nothing unusual about it, at a fifth of the time; else None.

    Ordinary: questions and answers in turn, no answer empty, and for an image one `<image>` in one of the questions.
    """
    if type(raw) is not dict or "messages" in raw or "images" in raw:
        return None
    turns, image = raw.get("conversations"), raw.get("image")
    if type(turns) is not list or not turns or len(turns) % 2 or not (image is None or (type(image) is str and image)):
        return None
    num_placeholders = 0
    messages = []
    for number, turn in enumerate(turns):
        speaker, role = ("gpt", "assistant") if number % 2 else ("human", "user")
        if type(turn) is not dict or turn.get("from") != speaker:
            return None
        text = turn.get("value")
        if type(text) is not str or "role" in turn or "content" in turn:
            return None
        content = [{"type": "text", "text": text}]
        if PLACEHOLDER in text:
            before, _, after = text.partition(PLACEHOLDER)
            num_placeholders += 1
            if role == "assistant" or PLACEHOLDER in after:
                return None
            text = (before + after).strip()
            content = [{"type": "image"}, {"type": "text", "text": text}] if text else [{"type": "image"}]
        elif role == "assistant" and (not text or text.isspace()):
            return None
        messages.append({"role": role, "content": content})
    if num_placeholders != (image is not None):
        return None
    return {"messages": messages, "images": [] if image is None else [image]}


def _text_problem(row: dict[str, Any], row_id: str) -> tuple[str, str]:
    """Return what keeps a row from being written or learned from as `(kind, detail)`, or two empty strings."""
    is_supervised = False
    try:
        row_id.encode()
        for message in row["messages"]:
            for part in message["content"]:
                text = part.get("text")
                if text:
                    text.encode()
                    is_supervised |= message["role"] == "assistant" and not text.isspace()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        return "bad_row", f"the text holds half a character ({half!r}, one of a pair of surrogates). Remove it."
    if not is_supervised:
        return "nothing_supervised", f"no turn is an answer with text in it. {PROBLEM_KINDS['nothing_supervised']}"
    return "", ""


def _locate(reference: Any, folder: ImageFolder) -> dict[str, Any]:
    if isinstance(reference, dict) and reference.get("bytes") is not None:
        return {"bytes": reference["bytes"], "path": reference.get("path")}
    if isinstance(reference, dict):
        reference = reference.get("path")
    if not isinstance(reference, str):
        raise ImageError("image_missing", f"image {reference!r}: expected a file name.")
    return {"bytes": None, "path": folder.locate(reference)}


def enforce_policy(
    bad_rows: Sequence[BadRow], num_rows: int, source: str, on_bad_row: str, on_bad_image: str, max_bad_fraction: float
) -> None:
    """Raise one `DataError` about the bad rows unless the recipe says to skip them and they are few enough."""
    refused = [bad for bad in bad_rows if (on_bad_image if bad.kind.startswith("image_") else on_bad_row) != "skip"]
    if refused:
        first = refused[0]
        key = "data.on_bad_image" if first.kind.startswith("image_") else "data.on_bad_row"
        raise DataError(
            f"{first.file}: row {first.row} (id {first.id}): {first.detail} "
            f"{len(refused)} of {num_rows} rows cannot be used. List them with: vir-hf data check {source}; leave them out "
            f"with {key}=skip."
        )
    if num_rows and len(bad_rows) == num_rows:
        raise DataError(
            f"{source}: none of its {num_rows} rows can be used; first: row {bad_rows[0].row}: {bad_rows[0].detail}"
        )
    if len(bad_rows) > max_bad_fraction * num_rows:
        first = bad_rows[0]
        raise DataError(
            f"{source}: {len(bad_rows)} of {num_rows} rows cannot be used, more than data.max_bad_fraction={max_bad_fraction}; "
            f"first: row {first.row} (id {first.id}): {first.detail} Mend the data (vir-hf data check {source} --fix OUT.json) "
            "or raise data.max_bad_fraction."
        )
    if bad_rows:
        logger.warning(
            "%s: left out %d of %d rows that cannot be used (data.on_bad_row=skip)", source, len(bad_rows), num_rows
        )


class OpenImages:
    """The transform of a dataset that opens a row's pictures when the row is read."""

    def __init__(self, allow_urls: bool = False) -> None:
        self.allow_urls = allow_urls

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "images" not in batch:
            return batch
        opened = []
        for index, images in enumerate(batch["images"]):
            try:
                opened.append([open_image(image, allow_urls=self.allow_urls) for image in images])
            except ImageError as error:
                row_id = batch["id"][index] if "id" in batch else "unknown"
                raise ImageError(error.kind, f"row with id {row_id}: {error}") from error
        return {**batch, "images": opened}
