"""Memory while a JSON array of any size is read: one is written into a pipe as it is read, so that it needs no disk.

    python benchmarks/json_stream.py --gigabytes 20

Prints the rows and bytes read, the rate, and the most memory the reader had at each tenth of the way.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from multiprocessing import get_context

from vir_hf.rows.files import read_rows


def write(path: str, num_bytes: int) -> None:
    """Write one array of LLaVA rows of about 1 KiB, of at least so many bytes."""
    answer = "It shows a street with a red bus, two people and a dog. " * 14
    turns = [{"from": "human", "value": "<image>\nWhat does it show?"}, {"from": "gpt", "value": answer}]
    row = json.dumps({"id": "000000000000", "image": "train/000000000000.jpg", "conversations": turns})
    block = (",\n".join([row] * 1000)).encode()
    written = 0
    with open(path, "wb") as pipe:
        pipe.write(b"[\n")
        while written < num_bytes:
            pipe.write((b",\n" if written else b"") + block)
            written += len(block)
        pipe.write(b"\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    num_bytes = int(parser.parse_args().gigabytes * 1e9)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.json")
        os.mkfifo(path)
        writer = get_context("fork").Process(target=write, args=(path, num_bytes), daemon=True)
        writer.start()
        started, num_rows, next_report = time.perf_counter(), 0, 0
        per_row = 929
        for number, _ in read_rows(path):
            num_rows = number + 1
            if num_rows * per_row >= next_report * num_bytes / 10:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"{num_rows:>12,} rows  peak {peak:.0f} MiB  {time.perf_counter() - started:.0f} s", flush=True)
                next_report += 1
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{num_rows:,} rows, {num_bytes / 1e9:g} GB, {num_bytes / 1e6 / seconds:.0f} MB/s, at most {peak:.0f} MiB")


if __name__ == "__main__":
    main()
