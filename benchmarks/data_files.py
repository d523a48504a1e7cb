"""How long large data files take: first start, second start, memory, a stream's first row, and the data check.

    python benchmarks/data_files.py --rows 665000
    python benchmarks/data_files.py --rows 100000 --photographs ../shared/data/coco/images --only check

Rows are made up in the lengths of LLaVA's instruction data, about 1.8 kB each. Each measurement is a process of its own.
Photographs are hard-linked under as many names as there are images.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

MEASURE = """
import json, resource, sys, time
started = time.perf_counter()
{imports}
imported, cpu = time.perf_counter(), time.process_time()
{body}
figures = dict(
    seconds=time.perf_counter() - imported,
    cpu_seconds=time.process_time() - cpu + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),
    import_seconds=imported - started,
    peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
)
print(json.dumps({{name: round(value, 1) for name, value in figures.items()}}))
"""
LOAD = (
    "from vir_hf.data.sources import load_llava_dataset",
    "load_llava_dataset(sys.argv[1], sys.argv[2], decode_images=False)[0]",
)
STREAM = (LOAD[0], "next(iter(load_llava_dataset(sys.argv[1], sys.argv[2], decode_images=False, streaming=True)))")
CHECK = (
    "from vir_hf.curation.checks import check_data",
    "assert not check_data(sys.argv[1], sys.argv[2]).untrainable_rows",
)
CASES = {
    "first start, one core": (LOAD, True),
    "second start, one core": (LOAD, True),
    "a stream's first row, never read before": (STREAM, True),
    "a stream's first row, read before": (STREAM, True),
    "data check, all cores": (CHECK, False),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=118_000, help="how many distinct images the rows show")
    parser.add_argument("--photographs", help="a folder of photographs; one drawn picture by default")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--folder", help="where the files are made (a temporary folder)")
    parser.add_argument("--json", help="write the figures to a file, or - for standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        path, images = make_files(root, options)
        figures = {"num_rows": options.rows, "megabytes": round(path.stat().st_size / 1e6), "cases": {}}
        for name, (code, one_core) in CASES.items():
            if options.only in name:
                figures["cases"][name] = measure(code, one_core, path, images, root)
                print(name, figures["cases"][name], flush=True)
    if options.json == "-":
        print(json.dumps(figures, indent=2))
    elif options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def make_files(root: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    images = root / "images"
    images.mkdir()
    if options.photographs:
        sources = sorted(Path(options.photographs).glob("*.jpg"))
        originals = [root / source.name for source in sources]
        for original, source in zip(originals, sources, strict=True):
            original.write_bytes(source.read_bytes())
    else:
        originals = [root / "drawn.jpg"]
        Image.effect_noise((640, 480), 40).convert("RGB").save(originals[0], quality=80)
    names = [f"{number:012d}.jpg" for number in range(min(options.images, options.rows))]
    for number, name in enumerate(names):
        link(originals, number, images / name)
    rng = random.Random(0)
    words = [f"word{rng.randrange(10 ** rng.randrange(1, 6))}" for _ in range(5_000)]
    path = root / "rows.json"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(options.rows):
            turns = []
            for turn in range(2 * rng.choice([1, 1, 3, 4, 5, 10])):
                text = " ".join(rng.choices(words, k=rng.randint(5, 40) if turn % 2 else 12))
                text = f"<image>\n{text}" if turn == 0 else text
                turns.append({"from": "gpt" if turn % 2 else "human", "value": text})
            row = {"id": f"row{number}", "image": rng.choice(names), "conversations": turns}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]\n")
    return path, images


def link(originals: list[Path], number: int, target: Path) -> None:
    """Link one of the originals in turn; a file takes only so many links (65,000 on ext4), so copies stand in."""
    which = number % len(originals)
    if number // len(originals) % 50_000 == 49_999:
        copy = originals[which].with_name(f"copy{number}.jpg")
        copy.write_bytes(originals[which].read_bytes())
        originals[which] = copy
    os.link(originals[which], target)


def measure(code: tuple[str, str], one_core: bool, path: Path, images: Path, root: Path) -> dict[str, float]:
    script = MEASURE.format(imports=code[0], body=code[1])
    command = [sys.executable, "-c", script, str(path), str(images)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}

    def pin() -> None:
        if one_core and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, preexec_fn=pin)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
