"""What is wrong with a data set: one pass over its rows and pictures, on all cores, before a GPU is paid for.

Rows are read in parts, each part in one process; pictures are looked at once however many rows show them. A problem is an
`error` when training would refuse the row, and a `warning` when it would take it in a way its owner may not intend.
"""

# Over 400 lines: one pass over the data finds every kind of problem; the kinds with rules of their own lie beside it.

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from vir_hf.curation.box_check import BoxScale, box_problems, box_scale, mixed_scales
from vir_hf.curation.contamination import CONTAMINATION
from vir_hf.data.filters import failed_by_columns, failed_by_quantities
from vir_hf.data.located import text_problem
from vir_hf.data.reading import BY_COLUMNS, Reading, Seen
from vir_hf.errors import DataError, ImageError, RecipeError, clipped, shown
from vir_hf.images.folder import ImageFolder
from vir_hf.images.identity import picture_identity
from vir_hf.images.opening import (
    ImageHeader,
    count_greys,
    is_misnamed,
    open_image,
    read_image_header,
)
from vir_hf.images.sizes import upright_size
from vir_hf.rows.encoding import IGNORE, encode_messages, encode_row
from vir_hf.rows.files import RowRange, find_data_files, image_root, read_rows, split_rows
from vir_hf.rows.image_lengths import image_lengths
from vir_hf.rows.keys import unread_keys
from vir_hf.rows.messages import FATAL_KINDS, PROBLEM_KINDS, examine
from vir_hf.rows.shapes import in_llava_form, with_columns

# Kind -> what to do. The kinds of conversations.py come first, then what only the whole data set shows.
REMEDIES = {
    **PROBLEM_KINDS,
    **CONTAMINATION,
    "too_long": "Raise max_length, or shorten the row: whole turns are dropped from its end.",
    "duplicate_id": "Give every row an id of its own; training takes both rows.",
    "duplicate_row": "Drop one of the two: what is there twice is learned twice.",
    "mixed_shapes": "Set data.format if all rows are of one shape; rows of others are bad rows then.",
    "box_outside": "Correct the box, or say with data.boxes how boxes are written.",
    "box_other_form": "Write the box as the others are, or say with data.boxes how boxes are written.",
    "box_mixed": "Write all boxes in one form: a model cannot tell which one a row means.",
    "image_missing": "Fetch the picture (vir-hf data prepare), or correct the path or the image folder.",
    "image_empty": "Fetch the picture again.",
    "image_truncated": "Fetch the picture again.",
    "image_unreadable": "Fetch the picture again, or convert it to JPEG or PNG.",
    "image_too_large": "Shrink the picture.",
    "image_outside_folder": "Keep pictures below the image folder.",
    "image_url": "Download the picture (vir-hf data prepare), or set data.allow_urls=true.",
    "image_shape": "Crop the image, or leave its rows out.",
    "image_few_greys": "Scale its greys to 8 bits yourself; the upper 8 of 16 bits are kept, whatever part of them is used.",
    "image_misnamed": "Nothing need be done: the content is what counts. Rename the file for other tools.",
}
ERRORS = frozenset([*FATAL_KINDS, "nothing_supervised", *(k for k in REMEDIES if k.startswith("image_"))]) - {
    "image_misnamed",
    "image_few_greys",
}
_FEW_GREYS = 64  # of 256: what a 12-bit image in a 16-bit file has left is 16, of a 10-bit one 4
_ROWS_PER_PART = 2_000
_IMAGES_PER_TASK = 500
_BYTES_PER_TASK = 2**20


class Problem(NamedTuple):
    """One thing wrong with one row; `row` counts from 0 in its file."""

    file: str
    row: int
    id: str
    kind: str
    detail: str

    @property
    def severity(self) -> str:
        """`error` when training refuses the row, else `warning`."""
        return "error" if self.kind in ERRORS else "warning"


@dataclasses.dataclass
class CheckReport:
    """All that a check found.

    Attributes:
        lengths: of every readable row, in tokens (image tokens included), or in characters when there was no tokenizer.
        supervised: how many of those tokens are learned; empty without a tokenizer.
        images: the header of every distinct picture that could be opened.
        rows_per_image: how many rows show each distinct picture.
        images_per_row: how many pictures each readable row shows.
        unread: keys of no known meaning, each with the number of rows that have it; they are left alone.
        seen: in which shapes rows were read, and how many a filter left out.
    """

    files: list[str]
    image_folder: str | None
    num_rows: int = 0
    problems: list[Problem] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    supervised: list[int] = dataclasses.field(default_factory=list)
    images: list[ImageHeader] = dataclasses.field(default_factory=list)
    rows_per_image: list[int] = dataclasses.field(default_factory=list)
    images_per_row: list[int] = dataclasses.field(default_factory=list)
    unread: Counter[str] = dataclasses.field(default_factory=Counter)
    seen: Seen = dataclasses.field(default_factory=Seen)
    max_length: int | None = None
    has_tokens: bool = False
    is_decoded: bool = False
    seconds: float = 0.0

    @property
    def bad_rows(self) -> set[tuple[str, int]]:
        """Every row with a problem, as (file, row)."""
        return {(problem.file, problem.row) for problem in self.problems}

    @property
    def untrainable_rows(self) -> set[tuple[str, int]]:
        """Every row that training would refuse, as (file, row)."""
        return {(problem.file, problem.row) for problem in self.problems if problem.severity == "error"}

    def kinds(self) -> dict[str, int]:
        """Return how often each kind was found, errors first, the most frequent first."""
        counts = Counter(problem.kind for problem in self.problems)
        return dict(sorted(counts.items(), key=lambda item: (item[0] not in ERRORS, -item[1], item[0])))


@dataclasses.dataclass
class _Check:
    """What every process needs to know."""

    image_folder: str | None
    allow_urls: bool = False
    decode: bool = False
    processor: Any = None
    max_length: int | None = None
    reading: Reading = BY_COLUMNS

    def folder_of(self, file: str) -> ImageFolder:
        """The folder references of a data file start from; kept, so that its listings are read once a process."""
        path = image_root(file, self.image_folder)
        if path not in _FOLDERS:
            _FOLDERS[path] = ImageFolder(path, allow_urls=self.allow_urls)
        return _FOLDERS[path]


_FOLDERS: dict[str, ImageFolder] = {}
_CHECK = _Check(None)


class _Embedded(NamedTuple):
    """An image that came with its row: which one it is, its header, and kind and detail of what is wrong with it."""

    identity: Hashable
    findings: list[ImageHeader | tuple[str, str]]


@dataclasses.dataclass
class _PartResult:
    """What one process found in one part of a file; row numbers are those of the file."""

    file: str
    num_rows: int = 0
    problems: list[Problem] = dataclasses.field(default_factory=list)
    keys: list[tuple[int, str, bytes]] = dataclasses.field(default_factory=list)  # row, id or "", digest of the rest
    references: list[tuple[int, str, str | _Embedded]] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    supervised: list[int] = dataclasses.field(default_factory=list)
    images_per_row: list[int] = dataclasses.field(default_factory=list)
    unread: Counter[str] = dataclasses.field(default_factory=Counter)
    seen: Seen = dataclasses.field(default_factory=Seen)
    box_scales: list[BoxScale] = dataclasses.field(default_factory=list)


def check_data(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    *,
    processor: Any = None,
    max_length: int | None = None,
    decode: bool = False,
    allow_urls: bool = False,
    num_workers: int | None = None,
    reading: Reading = BY_COLUMNS,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> CheckReport:
    """Return everything unusual in LLaVA data.

    Args:
        path, image_folder: as for `load_llava_dataset`.
        processor: what `encode_row` needs; without it, lengths are characters and `max_length` is not looked at.
        decode: decode every picture, instead of reading its header and its end.
        num_workers: processes; all cores by default, none for a small data set.
        reading: as for `load_llava_dataset`; rows that its filter leaves out are counted and not looked at.
        progress: called with `"rows"` or `"images"`, how many are done and how many there are.

    Raises:
        DataError: there is no data file, it is malformed JSON, or the image folder does not exist.
    """
    started = time.perf_counter()
    files = find_data_files(path)
    check = _Check(
        None if image_folder is None else os.fspath(image_folder), allow_urls, decode, processor, max_length, reading
    )
    if image_folder is not None:
        ImageFolder(image_folder)
    report = CheckReport(
        files, check.image_folder, max_length=max_length, has_tokens=processor is not None, is_decoded=decode
    )
    parts = [(file, part) for file in files for part in split_rows(file, sys.maxsize, _ROWS_PER_PART)]
    with _Pool(check, len(parts), num_workers) as pool:
        results = []
        for done, result in enumerate(pool.map(_check_part, parts), 1):
            results.append(result)
            report.num_rows += result.num_rows
            progress("rows", done, len(parts))
        _merge_rows(report, results)
        report.seen.refuse_absent_columns(os.fspath(path))
        _find_mixtures(report, results)
        _check_images(report, results, pool, progress)
    report.problems.sort(key=lambda problem: (files.index(problem.file), problem.row))
    report.seconds = time.perf_counter() - started
    return report


def without_kinds(report: CheckReport, kinds: Sequence[str]) -> CheckReport:
    """Return the report without the problems of some kinds.

    Raises:
        RecipeError: a kind that does not exist.
    """
    for kind in kinds:
        if kind not in REMEDIES:
            raise RecipeError(f"--ignore {kind}: no such kind; expected one of {', '.join(REMEDIES)}.")
    return dataclasses.replace(report, problems=[p for p in report.problems if p.kind not in kinds])


class _Pool:
    """Processes that know the check, or this one when there is little to do."""

    def __init__(self, check: _Check, num_tasks: int, num_workers: int | None) -> None:
        if num_workers is None:
            num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _start(check)
        self._num_workers = num_workers
        self._pool = None
        if num_workers > 1 and num_tasks > 1:
            # Forked processes share the tokenizer and the imports; where there is no fork they are sent and made anew.
            method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
            self._pool = concurrent.futures.ProcessPoolExecutor(
                num_workers, mp_context=multiprocessing.get_context(method), initializer=_start, initargs=(check,)
            )

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        return self._pool.map(function, tasks) if self._pool else map(function, tasks)

    def stream(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """`map` over tasks that are made as they are needed, a few ahead of what has been done."""
        if self._pool is None:
            yield from map(function, tasks)
            return
        running: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        for task in tasks:
            running.append(self._pool.submit(function, task))
            if len(running) > 2 * self._num_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _start(check: _Check) -> None:
    global _CHECK
    _CHECK = check
    _FOLDERS.clear()


def _check_part(task: tuple[str, RowRange]) -> _PartResult:
    file, part = task
    result = _PartResult(file)
    for number, raw in read_rows(file, part):
        result.num_rows += 1
        _check_row(raw, number, result)
    return result


def _check_row(raw: Any, number: int, result: _PartResult) -> None:
    seen = result.seen
    seen.num_rows += 1
    raw = with_columns(raw, _CHECK.reading.columns)
    failed = failed_by_columns(_CHECK.reading.conditions, raw, seen.absent)
    if failed is not None:
        seen.filtered[f"{failed.column} {failed.text}"] += 1
        return
    problems, shape, read, row = _read_row(raw)
    if row is not None:
        seen.add_shape(shape, str(number))
        failed = failed_by_quantities(_CHECK.reading.conditions, raw, row, lambda image: _size_of(image, result.file))
        if failed is not None:
            seen.filtered[f"{failed.column} {failed.text}"] += 1
            return
    written_id = read.get("id") if isinstance(read, dict) else None
    row_id = "" if written_id is None else _printable(str(written_id))
    result.keys.append((number, row_id, _digest(raw)))
    result.unread.update({clipped(_printable(name), 60) for name, matters in unread_keys(read) if not matters})
    if row is not None:
        problems += _check_content(row, number, clipped(row_id, 80), result)
        problems += _check_boxes(row, number, clipped(row_id, 80), result)
    result.problems += [
        Problem(result.file, number, clipped(row_id, 80), kind, clipped(_printable(detail)))
        for kind, detail in dict.fromkeys(problems)
    ]


def _read_row(raw: Any) -> tuple[list[tuple[str, str]], str, Any, dict[str, Any] | None]:
    """Return what is wrong with a row, its shape, the row as LLaVA writes it, and what `to_messages` makes of that."""
    try:
        shape, read = in_llava_form(raw, _CHECK.reading.format)
    except DataError as error:
        return [("bad_row", str(error))], "", raw, None
    problems, row = examine(read)
    return problems, shape, read, row


def _size_of(image: Any, file: str) -> tuple[int, int]:
    """Return width and height of an image of a row, as it stands upright."""
    if isinstance(image, dict) and image.get("bytes") is not None:
        return upright_size({"bytes": image["bytes"], "path": image.get("path")})
    name = image.get("path") if isinstance(image, dict) else image
    if not isinstance(name, str):
        raise ImageError("image_missing", f"image {shown(image)}: expected a file name")
    return upright_size(_CHECK.folder_of(file).locate(name))


def _check_boxes(row: dict[str, Any], number: int, row_id: str, result: _PartResult) -> Iterator[tuple[str, str]]:
    change = _CHECK.reading.boxes
    if change is not None:
        yield from box_problems(row, change, lambda image: _size_of(image, result.file))
    elif (scale := box_scale(row, number, row_id)) is not None:
        result.box_scales.append(scale)


def _check_content(row: dict[str, Any], number: int, row_id: str, result: _PartResult) -> Iterator[tuple[str, str]]:
    """Measure a row that can be read, note its pictures, and yield what is wrong with it."""
    result.images_per_row.append(len(row["images"]))
    for image in row["images"]:
        result.references.append((number, row_id, _reference(image)))
    kind, detail = text_problem(row, row["id"])
    if kind == "bad_row":
        yield kind, detail
    if kind:
        return  # nothing to measure; that nothing is supervised has been said
    if _CHECK.processor is None:
        result.lengths.append(sum(len(p.get("text") or "") for m in row["messages"] for p in m["content"]))
    else:
        images = row["images"]
        labels = encode_messages(row["messages"], _CHECK.processor, expand_images=False, images=images)["labels"]
        try:
            lengths = image_lengths(_in_their_folder(images, result.file), _CHECK.processor)
        except ImageError:
            return  # said where images are looked at
        except DataError as error:
            yield "image_shape", str(error)
            return
        num_tokens = len(labels) + sum(lengths) - len(images)
        result.lengths.append(num_tokens)
        result.supervised.append(len(labels) - labels.count(IGNORE))
        if _CHECK.max_length is not None and num_tokens > _CHECK.max_length:
            yield _too_long(row, num_tokens, _CHECK.max_length, result.file)


def _in_their_folder(images: list[Any], file: str) -> list[Any]:
    """Return the images with references turned into places, where their headers are needed for their tokens."""
    views = getattr(_CHECK.processor, "views", None)
    if views is None or views.is_fixed:
        return images
    located = []
    for image in images:
        path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
        located.append(_CHECK.folder_of(file).locate(path) if isinstance(path, str) else image)
    return located


def _printable(text: str) -> str:
    """Return the text with half characters (lone surrogates), which no terminal or file takes, made visible."""
    return text.encode("utf-8", "backslashreplace").decode()


def _too_long(row: dict[str, Any], num_tokens: int, max_length: int, file: str) -> tuple[str, str]:
    try:
        images = _in_their_folder(row["images"], file)
        kept = encode_row({**row, "images": images}, _CHECK.processor, max_length=max_length)
    except DataError as error:
        return "nothing_supervised", str(error)
    lost = num_tokens - len(kept["input_ids"])
    return "too_long", f"{num_tokens} tokens, {max_length} allowed: the last {lost} are cut off"


def _reference(image: Any) -> str | _Embedded:
    """Return a file's name as it is; of an embedded picture which one it is and what it looks like."""
    if isinstance(image, dict) and image.get("bytes") is not None:
        return _Embedded(picture_identity(image), _findings({"bytes": image["bytes"], "path": image.get("path")}))
    if isinstance(image, dict):
        image = image.get("path")
    if isinstance(image, str):
        return image
    return _Embedded(picture_identity(image), [("image_missing", f"image {shown(image)}: expected a file name")])


def _digest(raw: Any) -> bytes:
    content = {key: value for key, value in raw.items() if key != "id"} if isinstance(raw, dict) else raw
    text = json.dumps(content, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def _merge_rows(report: CheckReport, results: Sequence[_PartResult]) -> None:
    """Put the parts together and find what is there twice."""
    ids: dict[str, tuple[str, int]] = {}
    digests: dict[bytes, tuple[str, int]] = {}
    for result in results:
        report.problems += result.problems
        report.lengths += result.lengths
        report.supervised += result.supervised
        report.images_per_row += result.images_per_row
        report.unread += result.unread
        result.seen.firsts = {name: f"{result.file}: row {row}" for name, row in result.seen.firsts.items()}
        report.seen.add(result.seen)
        for row, row_id, digest in result.keys:
            place = (result.file, row)
            first = digests.setdefault(digest, place)
            if first != place:
                detail = f"the same as {_place(first, result.file)}"
                report.problems.append(Problem(result.file, row, clipped(row_id, 80), "duplicate_row", detail))
            same_id = ids.setdefault(row_id, place) if row_id else place
            if same_id != place and first == place:
                detail = f"{_place(same_id, result.file)} has this id too"
                report.problems.append(Problem(result.file, row, clipped(row_id, 80), "duplicate_id", detail))


def _find_mixtures(report: CheckReport, results: Sequence[_PartResult]) -> None:
    """Tell of the first row of each shape but the commonest, and of boxes of another scale than most."""
    for shape, _ in report.seen.shapes.most_common()[1:]:
        file, _, row = report.seen.firsts[shape].rpartition(": row ")
        usual = report.seen.shapes.most_common(1)[0][0]
        detail = f"the first of {report.seen.shapes[shape]:,} rows read as {shape}, most are {usual}"
        report.problems.append(Problem(file, int(row), "", "mixed_shapes", detail))
    scales: dict[str, list[BoxScale]] = {}
    for result in results:
        scales.setdefault(result.file, []).extend(result.box_scales)
    for file, scale, detail in mixed_scales(scales):
        report.problems.append(Problem(file, scale.row, scale.id, "box_mixed", detail))


def _place(place: tuple[str, int], file: str) -> str:
    return f"row {place[1]}" if place[0] == file else f"row {place[1]} of {place[0]}"


def _check_images(
    report: CheckReport, results: Sequence[_PartResult], pool: _Pool, progress: Callable[[str, int, int], None]
) -> None:
    """Look at every distinct picture once and tell its rows."""
    users: dict[tuple[Any, ...], list[tuple[str, int, str]]] = {}
    looked: list[tuple[tuple[Any, ...], list[ImageHeader | tuple[str, str]]]] = []
    for result in results:
        for row, row_id, reference in result.references:
            user = (result.file, row, row_id)
            if isinstance(reference, str):
                # The same reference below another data file's folder is another picture.
                users.setdefault(("" if report.image_folder else result.file, reference), []).append(user)
            else:  # embedded in its row, and looked at there
                key = ("embedded", reference.identity)
                if key not in users:
                    looked.append((key, reference.findings))
                users.setdefault(key, []).append(user)
    named = [key for key in users if key[0] != "embedded"]
    tasks = [named[start : start + _IMAGES_PER_TASK] for start in range(0, len(named), _IMAGES_PER_TASK)]
    outcomes = pool.map(_look_at_files, [[(users[key][0][0], key[1]) for key in task] for task in tasks])
    for done, (task, seen) in enumerate(zip(tasks, outcomes, strict=True), 1):
        looked += zip(task, seen, strict=True)
        progress("images", done, len(tasks))
    for key, findings in looked:
        report.rows_per_image.append(len(users[key]))
        for found in findings:
            if isinstance(found, ImageHeader):
                report.images.append(found)
            else:
                kind, detail = found
                report.problems += [Problem(*user, kind, _printable(detail)) for user in users[key]]


def look_at_pictures(
    sources: Iterable[str | dict[str, Any]],
    num_sources: int,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[ImageHeader | tuple[str, str]]:
    """Yield the header of each picture, or the kind and detail of what is wrong with it, found on all cores.

    Sources are taken as they are needed, and of embedded pictures no more are held than the processes are busy with.

    Args:
        num_sources: about how many there are.
    """
    num_tasks = -(-num_sources // _IMAGES_PER_TASK)
    with _Pool(_Check(None), num_tasks, num_workers) as pool:
        for done, outcomes in enumerate(pool.stream(_look_at_all, _tasks(sources)), 1):
            yield from outcomes
            progress(min(done, num_tasks), num_tasks)


def _tasks(sources: Iterable[str | dict[str, Any]]) -> Iterator[list[str | dict[str, Any]]]:
    task: list[str | dict[str, Any]] = []
    num_bytes = 0
    for source in sources:
        task.append(source)
        num_bytes += len(source["bytes"]) if isinstance(source, dict) else 0
        if len(task) == _IMAGES_PER_TASK or num_bytes > _BYTES_PER_TASK:
            yield task
            task, num_bytes = [], 0
    if task:
        yield task


def _look_at_all(sources: Sequence[str | dict[str, Any]]) -> list[ImageHeader | tuple[str, str]]:
    return [_look_at(source) for source in sources]


def _look_at_files(task: Sequence[tuple[str, str]]) -> list[Any]:
    return [_look_at_file(file, reference) for file, reference in task]


def _look_at_file(file: str, reference: str) -> list[ImageHeader | tuple[str, str]]:
    """Return the header of a referenced picture and what is unusual about it."""
    try:
        place = _CHECK.folder_of(file).locate(reference)
    except ImageError as error:
        return [(error.kind, str(error))]
    if place.startswith(("http://", "https://")):
        return []  # allowed, and not fetched to be looked at
    findings = _findings(place)
    header = findings[0]
    if isinstance(header, ImageHeader) and is_misnamed(reference, header.format):
        findings.append(("image_misnamed", f"{reference}: is a {header.format} file by its content"))
    return findings


def _findings(source: str | dict[str, Any]) -> list[ImageHeader | tuple[str, str]]:
    """Return the header of an image and what a person should know of it; or what keeps it from being opened."""
    outcome = _look_at(source)
    if not isinstance(outcome, ImageHeader) or not outcome.is_deep:
        return [outcome]
    try:
        num_greys, num_left = count_greys(source)
    except ImageError as error:
        return [(error.kind, str(error))]
    if num_left > _FEW_GREYS or num_left >= num_greys:
        return [outcome]
    name = shown(source if isinstance(source, str) else source.get("path") or "an embedded image")
    detail = f"{name}: of its {num_greys:,} greys {num_left} are left (of 256): it comes out nearly one colour"
    return [outcome, ("image_few_greys", detail)]


def _look_at(source: str | dict[str, Any]) -> ImageHeader | tuple[str, str]:
    try:
        header = read_image_header(source)
        if _CHECK.decode:
            open_image(source)
    except ImageError as error:
        return error.kind, str(error)
    return header
