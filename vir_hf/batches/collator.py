"""Rows -> one batch: padding-free with shared prefixes (the default), or padded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch.utils.data import default_collate

from vir_hf.errors import DataError, clipped, shown
from vir_hf.images.identity import picture_identity
from vir_hf.images.sizes import upright_size
from vir_hf.rows.encoding import IGNORE, encode_with_images
from vir_hf.rows.image_lengths import image_lengths, in_words, views_of_image

logger = logging.getLogger(__name__)


@dataclass
class _Picture:
    """One distinct picture of a batch, what makes it distinct, and, where images are cut into views, width and height."""

    key: Any
    source: Any
    size: tuple[int, int] | None = None


@dataclass
class _Row:
    """One encoded row: token ids, labels, and for each image span the index of its picture in the batch, and its length."""

    id: str
    input_ids: list[int]
    labels: list[int]
    images: list[int]
    lengths: list[int]
    masked_because: str | None = None


@dataclass
class LlavaDataCollator:
    """Makes batches for `LlavaForCausalLM` under TRL's `SFTTrainer` or transformers' `Trainer`, unmodified.

    Rows are what `load_llava_dataset` gives: `{"id", "messages", "images"}`, images opened or as references.

    Args:
        processor: a `LlavaProcessor`.
        max_length: tokens a row may take, image tokens included; longer rows lose text turns from their end.
        padding_free: one row of segments instead of a padded matrix; the same loss and gradients.
        share_prefixes: rows that begin with the same tokens and the same pictures keep that beginning once.
        on_bad_image: `"raise"`, or `"skip"`: the row stays in the batch with a blank picture and nothing supervised.
        preprocess: turns one image source into a `(3, height, width)` float tensor, or `(num_views, 3, height, width)` where
            images are cut into views; by the processor if `None`.
        with_row_ids: also put `row_ids` and `masked_rows` (each with id and reason) into the batch, for a trainer to take out.
        feature_lookup: `image source -> (num_patches, vision_hidden)` tensor, with views one more dimension first, or `None`;
            used in place of opening the picture.
    """

    processor: Any
    max_length: int | None = 2048
    padding_free: bool = True
    share_prefixes: bool = True
    on_bad_image: str = "raise"
    preprocess: Callable[[Any], torch.Tensor] | None = None
    with_row_ids: bool = False
    feature_lookup: Callable[[Any], torch.Tensor | None] | None = None

    def __post_init__(self) -> None:
        if self.on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image is 'raise' or 'skip', got {self.on_bad_image!r}")
        if self.preprocess is None:
            from vir_hf.images.preprocessing import ImagePreprocessor

            self.preprocess = ImagePreprocessor(self.processor.image_processor)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return one batch.

        Padding-free: `input_ids`, `labels`, `position_ids` `(1, T)`, `segment_lengths` and `segment_prefixes`
        `(num_segments,)`. Padded: `input_ids`, `attention_mask`, `labels` `(batch, length)`. With pictures also
        `pixel_values` `(num_distinct_images, 3, height, width)` and `image_indices` `(num_image_spans,)`. Where images are cut
        into views, `pixel_values` holds those of all images one after another, and `image_sizes` `(num_distinct_images, 2)` the
        images' height and width.

        Raises:
            DataError: a row or a picture that cannot be used, by its id.
        """
        pictures: list[_Picture] = []
        encoded = [self._encode(row, pictures) for row in rows]
        pixels = self._open_pictures(pictures, encoded)
        batch = self._pack(encoded) if self.padding_free else self._pad(encoded)
        batch.update(pixels)
        if self.with_row_ids:
            batch["row_ids"] = [row.id for row in encoded]
            batch["masked_rows"] = [
                {"id": row.id, "reason": row.masked_because} for row in encoded if row.masked_because is not None
            ]
        return batch

    def _encode(self, row: Mapping[str, Any], pictures: list[_Picture]) -> _Row:
        row, broken = self._with_blanks(row)
        encoding, sources = encode_with_images(row, self.processor, max_length=self.max_length)
        # A copy that only keeps its rank in step with the others, or a row of an image that is gone.
        is_masked = bool(row.get("is_masked")) or broken is not None
        labels = [IGNORE] * len(encoding["labels"]) if is_masked else encoding["labels"]
        lengths = image_lengths(sources, self.processor)
        num_image_tokens = encoding["input_ids"].count(self.processor.image_token_id)
        if num_image_tokens != sum(lengths):
            views = self.processor.views
            wanted = f"{len(lengths)} images of {views.most_tokens} tokens" if views.is_fixed else in_words(lengths)
            raise DataError(
                f"row {shown(row.get('id', ''))}: {num_image_tokens} image tokens for {wanted}. Processor and row disagree; "
                "is the processor the model's own?"
            )
        indices = []
        for source in sources:
            key = picture_identity(source)
            index = next((i for i, picture in enumerate(pictures) if picture.key == key), None)
            if index is None:
                index = len(pictures)
                size = None if self.processor.views.is_fixed else upright_size(source)
                pictures.append(_Picture(key, source, size))
            indices.append(index)
        return _Row(str(row.get("id") or ""), encoding["input_ids"], labels, indices, lengths, broken)

    def _with_blanks(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
        """Return the row with a blank in place of each image whose header cannot be read, and why; under `skip` alone.

        Without its size nobody knows how many tokens such an image takes.
        """
        if self.on_bad_image == "raise" or self.processor.views.is_fixed:
            return row, None
        images, reason = list(row.get("images") or ()), None
        for number, source in enumerate(images):
            try:
                views_of_image(source, self.processor)
            except DataError as error:
                reason = str(error)
                logger.warning("row %s is masked: %s", shown(row.get("id", "")), reason)
                images[number] = Image.new("RGB", self.processor.image_size)
        return ({**row, "images": images}, reason) if reason else (row, None)

    def _open_pictures(self, pictures: list[_Picture], rows: list[_Row]) -> dict[str, torch.Tensor]:
        """Pixels, or features computed before, of the distinct pictures; a picture that breaks masks its rows or raises."""
        if not pictures:
            return {}
        if self.feature_lookup is not None:
            features = [self.feature_lookup(picture.source) for picture in pictures]
            found = [feature for feature in features if feature is not None]
            if len(found) == len(pictures):
                return {"vision_features": self._joined(found), **self._sizes(pictures)}
        preprocess: Any = self.preprocess  # set by __post_init__ where it was not given
        pixels: list[torch.Tensor] = []
        for index, picture in enumerate(pictures):
            blank = torch.zeros(*self._num_views(picture), 3, *self.processor.image_size)
            try:
                pixels.append(self._checked(preprocess(picture.source), blank))
            except DataError as error:
                users = [row for row in rows if index in row.images]
                names = clipped(", ".join(row.id for row in users), 120)
                if self.on_bad_image == "raise":
                    raise DataError(
                        f"row {names}: {error} Mend or remove the row, or set data.on_bad_image=skip."
                    ) from error
                logger.warning("row %s is masked: %s", names, error)
                for row in users:
                    row.labels = [IGNORE] * len(row.labels)
                    row.masked_because = str(error)
                pixels.append(blank)
        return {"pixel_values": self._joined(pixels), **self._sizes(pictures)}

    def _num_views(self, picture: _Picture) -> tuple[int, ...]:
        return () if picture.size is None else (self.processor.views.of(*picture.size).num_views,)

    @staticmethod
    def _checked(pixels: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        if pixels.ndim == 4 and pixels.shape != expected.shape:
            raise DataError(f"the image has {len(expected)} views by its header, and {len(pixels)} as it is decoded.")
        return pixels

    def _joined(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        # Stacked where it has to go: in a dataloader worker straight into shared memory, at half the time of a copy to there.
        if self.processor.views.is_fixed:
            return default_collate(tensors)  # type: ignore[no-any-return]
        return default_collate([view for tensor in tensors for view in tensor])  # type: ignore[no-any-return]

    def _sizes(self, pictures: list[_Picture]) -> dict[str, torch.Tensor]:
        sizes = [(picture.size[1], picture.size[0]) for picture in pictures if picture.size is not None]
        return {"image_sizes": torch.tensor(sizes)} if sizes else {}

    def _pack(self, rows: list[_Row]) -> dict[str, Any]:
        """One row of segments; rows that share a beginning are brought together behind it."""
        input_ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        prefixes: list[int] = []

        def add(ids: list[int], targets: list[int], start: int, prefix: int) -> None:
            input_ids.extend(ids)
            # What precedes a segment's first token in the packed row is not what precedes it in its own row.
            labels.extend([IGNORE, *targets[1:]])
            positions.extend(range(start, start + len(ids)))
            lengths.append(len(ids))
            prefixes.append(prefix)

        images: list[int] = []
        image_token_id = self.processor.image_token_id
        for shared, members in self._groups(rows):
            first = members[0]
            prefix = len(lengths) if shared else -1
            num_shared_tokens = first.input_ids[:shared].count(image_token_id)
            num_shared_images = list(accumulate(first.lengths, initial=0)).index(num_shared_tokens)
            if shared:
                add(first.input_ids[:shared], [IGNORE] * shared, 0, -1)
                images.extend(first.images[:num_shared_images])
            for row in members:
                add(row.input_ids[shared:], row.labels[shared:], shared, prefix)
                images.extend(row.images[num_shared_images:])
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([input_ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            "segment_lengths": torch.tensor(lengths),
            "segment_prefixes": torch.tensor(prefixes),
        }
        if images:
            batch["image_indices"] = torch.tensor(images)
        return batch

    def _groups(self, rows: list[_Row]) -> list[tuple[int, list[_Row]]]:
        """`(shared tokens, rows)`: rows that begin alike, up to and including their first picture, in order of arrival."""
        if not self.share_prefixes:
            return [(0, [row]) for row in rows]
        groups: dict[Any, list[_Row]] = {}
        for number, row in enumerate(rows):
            end = self._first_picture_end(row)
            head = (row.images[0], tuple(row.input_ids[:end])) if end else ("alone", number)
            groups.setdefault(head, []).append(row)
        return [(self._shared_length(members) if len(members) > 1 else 0, members) for members in groups.values()]

    def _first_picture_end(self, row: _Row) -> int:
        """How many tokens the row has through its first picture, or 0 if they cannot be shared."""
        if not row.images:
            return 0
        end = row.input_ids.index(self.processor.image_token_id) + row.lengths[0]
        return end if end <= shareable_length(row.labels) else 0

    def _shared_length(self, rows: list[_Row]) -> int:
        """The longest beginning all rows have in common, never ending inside a picture nor covering different ones."""
        first = rows[0]
        limit = min(shareable_length(row.labels) for row in rows)
        length = min(self._first_picture_end(first), limit)
        while length < limit and all(row.input_ids[length] == first.input_ids[length] for row in rows[1:]):
            length += 1
        position, image = 0, 0
        while position < length:
            if first.input_ids[position] != self.processor.image_token_id:
                position += 1
                continue
            is_same = all(row.images[image] == first.images[image] for row in rows)
            if not is_same or position + first.lengths[image] > length:
                return position
            position, image = position + first.lengths[image], image + 1
        return length

    def _pad(self, rows: list[_Row]) -> dict[str, Any]:
        length = max(len(row.input_ids) for row in rows)
        pad = self.processor.tokenizer.pad_token_id or 0

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (length - len(values))

        batch = {
            "input_ids": torch.tensor([padded(row.input_ids, pad) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
            "labels": torch.tensor([padded(row.labels, IGNORE) for row in rows]),
        }
        images = [index for row in rows for index in row.images]
        if images:
            batch["image_indices"] = torch.tensor(images)
        return batch


def shareable_length(labels: Sequence[int]) -> int:
    """How many leading tokens of a row with these labels may be shared: all before the predecessor of the first supervised one.

    The predecessor stays in the row's own segment, so that each row is scored on its own first supervised token.
    """
    first_supervised = next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))
    return max(first_supervised - 1, 0)
