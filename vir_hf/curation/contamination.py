"""Training rows that a test is made of: its images, by content and by what they show, and its questions."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vir_hf.errors import DataError, shown
from vir_hf.images.folder import ImageFolder
from vir_hf.images.identity import picture_identity
from vir_hf.images.likeness import look_alike, near_pairs, perceptual_hash, small_copy
from vir_hf.images.opening import decode_image, read_image_bytes
from vir_hf.rows.files import find_data_files, read_rows
from vir_hf.rows.messages import examine
from vir_hf.scores.matching import normalised

TEST_IMAGE, TEST_IMAGE_ALIKE, TEST_QUESTION = "test_image", "test_image_alike", "test_question"
CONTAMINATION = {
    TEST_IMAGE: "The image is one of the test's, byte for byte: leave the row out (--fix does), or the test measures memory.",
    TEST_IMAGE_ALIKE: "The image looks like one of the test's, saved again or resized: leave the row out (--fix does).",
    TEST_QUESTION: "The question is one of the test's, a long one but for a word: see whether its answer is the test's too.",
}
_FEWEST_WORDS = 5  # shorter questions are asked of every image
_FEWEST_TO_DIFFER = 10  # "Is there a dog in the image?" is not "Is there a cat in the image?"
_QUESTION_KEYS = ("question", "query", "text", "prompt")
_IMAGE_KEYS = ("image", "image_path", "imgname", "images", "img", "file_name")


@dataclass
class _Shown:
    """The images of one side: by content, and small copies of them."""

    places: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    copies: list[np.ndarray] = field(default_factory=list)
    number_of: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One training row that the test holds: file, row, id, kind, and in words of which test row."""

    file: str
    row: int
    id: str
    kind: str
    detail: str


def find_contamination(
    path: str | os.PathLike[str],
    image_folder: str | None,
    test: str | os.PathLike[str],
    test_image_folder: str | None,
    *,
    num_workers: int | None = None,
) -> list[Finding]:
    """Return every training row whose image or question is one of a test's.

    Args:
        test: a file of test rows in any form with `image` and `question` (or `text`), LLaVA rows, or a benchmark's own.
        test_image_folder: where its images lie; beside the test file by default.
        num_workers: threads that open images.

    Raises:
        DataError: the test holds neither images that can be opened nor questions.
    """
    training = list(_rows_of(path, image_folder))
    tested = list(_rows_of(test, test_image_folder))
    with ThreadPoolExecutor(num_workers or min(8, os.cpu_count() or 1)) as pool:
        ours, theirs = _look_at(training, pool), _look_at(tested, pool)
    num_questions = sum(bool(row.questions) for row in tested)
    if not theirs.contents and not num_questions:
        raise DataError(
            f"--against {test}: holds neither an image that can be opened nor a question; nothing to compare with."
        )
    wanted_images = any(row.images for row in tested)
    if wanted_images and not theirs.contents:
        raise DataError(
            f"--against {test}: none of its images can be opened in {tested[0].folder.path}; name their folder with "
            "--against-image-folder."
        )
    return [*_by_images(training, tested, ours, theirs), *_by_questions(training, tested)]


@dataclass(frozen=True)
class _Row:
    file: str
    number: int
    id: str
    images: tuple[Any, ...]
    questions: tuple[str, ...]
    folder: ImageFolder


def _rows_of(path: str | os.PathLike[str], image_folder: str | None) -> Iterator[_Row]:
    for file in find_data_files(path):
        folder = ImageFolder(image_folder or os.path.dirname(os.path.abspath(file)))
        for number, raw in read_rows(file):
            if isinstance(raw, Mapping) and isinstance(
                raw.get("data"), list
            ):  # TextVQA, DocVQA: one object with the rows
                yield from (_row(file, place, one, folder) for place, one in enumerate(raw["data"]))
            elif isinstance(raw, Mapping):
                yield _row(file, number, raw, folder)


def _row(file: str, number: int, raw: Mapping[str, Any], folder: ImageFolder) -> _Row:
    name = str(next((raw[key] for key in ("id", "question_id", "questionId", "index") if raw.get(key) is not None), ""))
    if raw.get("conversations") is not None or raw.get("messages") is not None:
        _, normal = examine(raw)
        if normal is None:  # what is wrong with it is reported by the check itself
            return _Row(file, number, name, (), (), folder)
        asked = [
            "".join(part["text"] for part in message["content"] if part["type"] == "text")
            for message in normal["messages"]
            if message["role"] == "user"
        ]
        return _Row(file, number, name, tuple(normal["images"]), tuple(asked), folder)
    found = next((raw[key] for key in _IMAGE_KEYS if raw.get(key) is not None), None)
    images = () if found is None else tuple(found) if isinstance(found, (list, tuple)) else (found,)
    text = next((raw[key] for key in _QUESTION_KEYS if isinstance(raw.get(key), str)), None)
    return _Row(file, number, name, images, () if text is None else (text.split("\n")[0],), folder)


def _look_at(rows: Sequence[_Row], pool: ThreadPoolExecutor) -> _Shown:
    """Read each place once, and make a small copy of each content once; what cannot be opened is left to the check itself."""
    places: dict[Any, tuple[ImageFolder, Any]] = {}
    for row in rows:
        for image in row.images:
            places.setdefault(_place(row, image), (row.folder, image))

    def read(one: tuple[ImageFolder, Any]) -> tuple[str, np.ndarray] | None:
        folder, image = one
        try:
            data, name = read_image_bytes(image, folder)
            return str(picture_identity(data)), small_copy(decode_image(data, name))
        except DataError:
            return None

    found = _Shown()
    number_of_content: dict[str, int] = {}
    for key, result in zip(places, pool.map(read, places.values()), strict=True):
        if result is None:
            continue
        content, copy = result
        if content not in number_of_content:
            number_of_content[content] = len(found.contents)
            found.contents.append(content)
            found.copies.append(copy)
        found.number_of[key] = number_of_content[content]
    return found


def _place(row: _Row, image: Any) -> str:
    return f"{row.folder.path} {picture_identity(image) if not isinstance(image, str) else image}"


def _by_images(training: Sequence[_Row], tested: Sequence[_Row], ours: _Shown, theirs: _Shown) -> Iterator[Finding]:
    same = {content: number for number, content in enumerate(theirs.contents)}
    matches: dict[int, tuple[str, int]] = {
        number: (TEST_IMAGE, same[content]) for number, content in enumerate(ours.contents) if content in same
    }
    hashes, others = (
        np.array([perceptual_hash(copy) for copy in side.copies], dtype=np.uint64) for side in (ours, theirs)
    )
    if len(hashes) and len(others):
        for one, other in near_pairs(hashes, others):
            if one not in matches and look_alike(ours.copies[one], theirs.copies[other]):
                matches[one] = (TEST_IMAGE_ALIKE, other)
    first_row: dict[int, _Row] = {}
    for row in tested:
        for image in row.images:
            number = theirs.number_of.get(_place(row, image))
            if number is not None:
                first_row.setdefault(number, row)
    for row in training:
        for image in row.images:
            number = ours.number_of.get(_place(row, image))
            if number in matches:
                kind, other = matches[number]
                said = "is" if kind == TEST_IMAGE else "looks like"
                yield Finding(
                    row.file, row.number, row.id, kind, f"image {said} that of the test's {_named(first_row[other])}"
                )


def _named(row: _Row) -> str:
    return f"row {row.number}" + (f" (id {shown(row.id)})" if row.id else "")


def _signatures(question: str) -> Iterator[tuple[str, ...]]:
    """Yield what a question shares with every other that has the same words but for one: its words, and all but each."""
    words = tuple(normalised(question.replace("<image>", " ")).split())
    if len(words) >= _FEWEST_WORDS:
        yield words
    if len(words) >= _FEWEST_TO_DIFFER:
        yield from itertools.combinations(words, len(words) - 1)


def _by_questions(training: Sequence[_Row], tested: Sequence[_Row]) -> Iterator[Finding]:
    known: dict[tuple[str, ...], _Row] = {}
    for row in tested:
        for question in row.questions:
            for signature in _signatures(question):
                known.setdefault(signature, row)
    for row in training:
        for question in row.questions:
            match = next((known[one] for one in _signatures(question) if one in known), None)
            if match is not None:
                detail = (
                    f"question {shown(question.replace('<image>', '').strip())} is that of the test's {_named(match)}"
                )
                yield Finding(row.file, row.number, row.id, TEST_QUESTION, detail)
                break
