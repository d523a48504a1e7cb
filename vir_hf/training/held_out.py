"""Rows kept out of training to be evaluated on: a seeded split in which no image is on both sides."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import Any

from vir_hf.data.cache import flat_batches
from vir_hf.errors import DataError, RecipeError
from vir_hf.images.identity import picture_identity
from vir_hf.images.opening import read_image_bytes


def split_by_image(rows: Any, fraction: float, seed: int, *, allow_urls: bool = False) -> tuple[list[int], list[int]]:
    """Return the numbers of the rows to train on and of those held out, each ascending.

    Rows that share an image, directly or through other rows, stay together; a row without one stays with its copies. Images
    are compared by the content of their files, whatever they are called and wherever they lie: each file is read once.

    Args:
        rows: a data set of `load_llava_dataset(..., decode_images=False)`.
        fraction: of the rows to hold out, above 0 and at most 0.5. No group is split to meet it, so a little less may be
            held out, never more.
        seed: another one chooses other groups. The choice does not depend on the order of the rows.
        allow_urls: fetch images that are named by a URL; else the URL itself says which image it is.

    Raises:
        RecipeError: no group of rows is small enough to be held out.
    """
    groups = _groups(rows, allow_urls)
    order = sorted(groups, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest())
    room = int(fraction * len(rows))
    held_out: list[int] = []
    for key in order:
        if len(groups[key]) <= room - len(held_out):
            held_out += groups[key]
    if not held_out:
        raise RecipeError(
            f"data.eval_fraction: {fraction:g} of {len(rows)} rows are at most {room}, and the smallest group of rows with "
            f"common images has {min(map(len, groups.values()), default=0)}. Set a larger data.eval_fraction, or "
            "data.eval_path=ROWS.json."
        )
    kept = set(held_out)
    return [number for number in range(len(rows)) if number not in kept], sorted(held_out)


def _groups(rows: Any, allow_urls: bool) -> dict[str, list[int]]:
    """Rows that may not be parted, under the smallest of their images' identities: row numbers, ascending."""
    leaders: dict[str, str] = {}  # an identity -> one of the same group; the smallest leads itself
    contents: dict[str, str] = {}

    def leader(key: str) -> str:
        while leaders[key] != key:
            leaders[key] = key = leaders[leaders[key]]
        return key

    first_of: list[str] = []
    for _, table in flat_batches(rows, ["messages", "images"]):
        for messages, images in zip(
            table.column("messages").to_pylist(), table.column("images").to_pylist(), strict=True
        ):
            keys = [_content(image, contents, allow_urls) for image in images or []] or [_words(messages)]
            for key in keys:
                leaders.setdefault(key, key)
                one, other = sorted((leader(keys[0]), leader(key)))
                leaders[other] = one
            first_of.append(keys[0])
    groups = defaultdict(list)
    for number, key in enumerate(first_of):
        groups[leader(key)].append(number)
    return dict(groups)


def _content(image: dict[str, Any], contents: dict[str, str], allow_urls: bool) -> str:
    """The identity of an image's undecoded content; of its place where it cannot be read, as the run will say or has said."""
    if image.get("bytes") is not None:
        return str(picture_identity(image))
    place = str(image.get("path"))
    if place not in contents:
        try:
            contents[place] = str(picture_identity(read_image_bytes(place, allow_urls=allow_urls)[0]))
        except DataError:
            contents[place] = str(picture_identity(place))
    return contents[place]


def _words(messages: Any) -> str:
    return "words:" + hashlib.blake2b(json.dumps(messages).encode(), digest_size=16).hexdigest()
