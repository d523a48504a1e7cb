"""Pictures a second on one core: transformers' Pillow processor and ours, with and without what the extra `fast` brings.

    python benchmarks/dataloader.py --images ../shared/data/coco/images
    python benchmarks/dataloader.py                       # on pictures drawn here, 640x480

The methods take turns on batches of 16, as a dataloader worker makes them; CPU time is counted, the shortest of the repeats,
so that other work on the machine blurs it little.
Decoding is part of each: from the bytes of a JPEG file to `pixel_values`, which are the same to the bit.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from vir_hf.images.opening import open_image
from vir_hf.images.preprocessing import ImagePreprocessor, recommended_num_workers

SQUARE = {"height": 336, "width": 336}
PROCESSORS = {
    "LLaVA-1.5, pad to square 336": LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size={"shortest_edge": 336}
    ),
    "CLIP, centre crop 336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE),
    "SigLIP, plain resize 384": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
}
BATCH = 16
# Name, whether simplejpeg decodes, whether the kernels resize.
WAYS = (
    ("vir_hf", True, True),
    ("without numba", True, False),
    ("without simplejpeg", False, True),
    ("without both", False, False),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder of photographs; drawn pictures by default")
    parser.add_argument("--count", type=int, default=100, help="how many of them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, recommended_num_workers()], help="of the DataLoader"
    )
    parser.add_argument("--json", help="write the figures to a file, or - for standard output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = load_files(options.images, options.count)
    figures: dict[str, Any] = {"num_images": len(files), "processors": {}}
    for name, processor in PROCESSORS.items():
        figures["processors"][name] = compare(processor, files, options.repeats)
    figures["dataloader"] = {f"{n} workers": loader_rate(files, n) for n in dict.fromkeys(options.workers)}
    print_figures(figures)
    if options.json == "-":
        print(json.dumps(figures, indent=2))
    elif options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def load_files(folder: str | None, count: int) -> list[bytes]:
    """Return the bytes of JPEG files: photographs, or blobs with grain that compress about as well."""
    if folder:
        return [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))[:count]]
    rng = np.random.default_rng(0)
    files = []
    for _ in range(min(count, 20)):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        grain = rng.normal(0, 8, (480, 640, 3))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def compare(processor: Any, files: list[bytes], repeats: int) -> dict[str, Any]:
    """Return images a second of CPU time for each method, and the ratios; the pixels of all are the same, or it stops."""
    methods: dict[str, Callable[[bytes], torch.Tensor]] = {
        "transformers": lambda data: processor(open_image(data), return_tensors="pt")["pixel_values"][0],
    }
    for name, has_decoder, has_kernels in WAYS:
        preprocess = ImagePreprocessor(processor)
        preprocess.has_decoder &= has_decoder
        preprocess.has_kernels &= has_kernels
        methods[name] = preprocess
    best = dict.fromkeys(methods, 0.0)
    for first in range(0, len(files), BATCH):
        batch = files[first : first + BATCH]
        shortest = dict.fromkeys(methods, float("inf"))
        for _ in range(repeats):
            for name, method in methods.items():
                start = time.process_time()
                for data in batch:
                    method(data)
                shortest[name] = min(shortest[name], time.process_time() - start)
        best = {name: best[name] + shortest[name] for name in methods}
    for data in files:
        reference = methods["transformers"](data)
        for name, method in methods.items():
            if not torch.equal(method(data), reference):
                raise SystemExit(f"{name}: pixels differ from those of transformers")
    return {
        "images_per_second": {name: round(len(files) / value, 1) for name, value in best.items()},
        "times_transformers": {name: round(best["transformers"] / value, 2) for name, value in best.items()},
    }


def loader_rate(files: list[bytes], num_workers: int) -> float:
    """Return images a second of wall time through a DataLoader."""
    preprocess = ImagePreprocessor(next(iter(PROCESSORS.values())))
    repeated = files * max(1, 400 // len(files))
    loader = DataLoader(
        repeated,  # type: ignore[arg-type]
        batch_size=BATCH,
        num_workers=num_workers,
        collate_fn=lambda batch: default_collate([preprocess(data) for data in batch]),  # as the collator does,
    )
    batches = iter(loader)
    next(batches)  # workers start meanwhile
    start = time.perf_counter()
    num_images = sum(len(batch) for batch in batches)
    return round(num_images / (time.perf_counter() - start), 1)


def print_figures(figures: dict[str, Any]) -> None:
    names = ["transformers", *(name for name, *_ in WAYS)]
    print(f"{figures['num_images']} pictures; images a second of one core's time, all bit-equal\n")
    print(f"| processor | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for processor, found in figures["processors"].items():
        cells = [f"{found['images_per_second'][n]:.0f} ({found['times_transformers'][n]:.1f}x)" for n in names]
        print(f"| {processor} | {' | '.join(cells)} |")
    print("\nDataLoader, pad to square, wall time:")
    for name, rate in figures["dataloader"].items():
        print(f"  {name}: {rate} images a second")


if __name__ == "__main__":
    sys.exit(main())
