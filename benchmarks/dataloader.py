"""Pictures a second on one core: transformers' Pillow processor, our bit-equal way, our fast way, side by side.

    python benchmarks/dataloader.py --images ../shared/data/coco/images
    python benchmarks/dataloader.py                       # on pictures drawn here, 640x480

The methods take turns on every picture; CPU time is counted, the shortest of the repeats, so that other work on the machine
blurs it little.
Decoding is part of each: from the bytes of a JPEG file to `pixel_values`.
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
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from vir_hf.images import open_image
from vir_hf.preprocessing import ImagePreprocessor, recommended_num_workers

SQUARE = {"height": 336, "width": 336}
PROCESSORS = {
    "LLaVA-1.5, pad to square 336": LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size={"shortest_edge": 336}
    ),
    "CLIP, centre crop 336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE),
    "SigLIP, plain resize 384": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
}


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
    """Return images a second of CPU time for each method, the ratios, and how far the pictures differ."""
    exact, fast = ImagePreprocessor(processor, exact=True), ImagePreprocessor(processor)
    methods: dict[str, Callable[[bytes], torch.Tensor]] = {
        "transformers": lambda data: processor(open_image(data), return_tensors="pt")["pixel_values"][0],
        "bit-equal": exact,
        "fast": fast,
    }
    best = dict.fromkeys(methods, 0.0)
    for data in files:
        shortest = dict.fromkeys(methods, float("inf"))
        for _ in range(repeats):
            for name, method in methods.items():
                start = time.process_time()
                method(data)
                shortest[name] = min(shortest[name], time.process_time() - start)
        best = {name: best[name] + shortest[name] for name in methods}
    deviation = torch.tensor(processor.image_std).view(3, 1, 1)
    differences = []
    for data in files:
        reference = methods["transformers"](data)
        if not torch.equal(exact(data), reference):
            raise SystemExit("the bit-equal way is not bit-equal")
        differences.append((fast(data) - reference).abs() * deviation * 255)
    return {
        "images_per_second": {name: round(len(files) / value, 1) for name, value in best.items()},
        "times_transformers": {name: round(best["transformers"] / value, 2) for name, value in best.items()},
        "mean_difference_of_255": round(float(np.mean([d.mean() for d in differences])), 4),
        "worst_picture_of_255": round(float(max(d.mean() for d in differences)), 4),
        "largest_difference_of_255": round(float(max(d.max() for d in differences)), 2),
    }


def loader_rate(files: list[bytes], num_workers: int) -> float:
    """Return images a second of wall time through a DataLoader, in batches of 16."""
    preprocess = ImagePreprocessor(next(iter(PROCESSORS.values())))
    repeated = files * max(1, 400 // len(files))
    loader = DataLoader(
        repeated,  # type: ignore[arg-type]
        batch_size=16,
        num_workers=num_workers,
        collate_fn=lambda batch: torch.stack([preprocess(data) for data in batch]),
    )
    start = time.perf_counter()
    num_images = sum(len(batch) for batch in loader)
    return round(num_images / (time.perf_counter() - start), 1)


def print_figures(figures: dict[str, Any]) -> None:
    print(f"{figures['num_images']} pictures; images a second of one core's time\n")
    print("| processor | transformers | bit-equal | fast | mean difference of the fast way |\n|---|---|---|---|---|")
    for name, found in figures["processors"].items():
        rates, times = found["images_per_second"], found["times_transformers"]
        print(
            f"| {name} | {rates['transformers']:.0f} | {rates['bit-equal']:.0f} ({times['bit-equal']:.1f}x) | "
            f"{rates['fast']:.0f} ({times['fast']:.1f}x) | {found['mean_difference_of_255']} of 255 "
            f"(worst picture {found['worst_picture_of_255']}) |"
        )
    print("\nDataLoader, fast way, pad to square, wall time:")
    for name, rate in figures["dataloader"].items():
        print(f"  {name}: {rate} images a second")


if __name__ == "__main__":
    sys.exit(main())
