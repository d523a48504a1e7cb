"""The sound rows of a checked data set as a file of their own, and the list of those left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vir_hf import files
from vir_hf.curation.contamination import TEST_IMAGE, TEST_IMAGE_ALIKE
from vir_hf.errors import DataError
from vir_hf.rows.files import read_rows

if TYPE_CHECKING:
    from vir_hf.curation.checks import CheckReport


_LEFT_OUT = ("duplicate_row", TEST_IMAGE, TEST_IMAGE_ALIKE)  # can be trained on, and should not be


def dropped_path(out: str | os.PathLike[str]) -> Path:
    """Return where the list of dropped rows goes: `OUT.dropped.json`."""
    return Path(out).with_suffix(".dropped.json")


def write_sound_rows(report: CheckReport, out: str | os.PathLike[str]) -> tuple[int, int]:
    """Write the rows without an error as they were, and return how many were kept and dropped.

    The second of two equal rows is dropped too, and what shows an image of the test that was checked against; of rows
    that merely share an id, the later ones get a new id. Other
    warnings are about rows that can be trained on, which stay. The two files appear when they are complete.

    Raises:
        DataError: `out` is one of the checked files, or the rows hold embedded pictures, which JSON cannot.
    """
    out = Path(out)
    if any(files.is_same_file(written, file) for written in (out, dropped_path(out)) for file in report.files):
        raise DataError(f"{out}: is the file that was checked; name another for --fix, so that nothing is lost.")
    faults: dict[tuple[str, int], list[dict[str, str]]] = {}
    renamed: set[tuple[str, int]] = set()
    for problem in report.problems:
        place = (problem.file, problem.row)
        if problem.severity == "error" or problem.kind in _LEFT_OUT:
            faults.setdefault(place, []).append({"kind": problem.kind, "detail": problem.detail})
        elif problem.kind == "duplicate_id":
            renamed.add(place)
    dropped: list[dict[str, Any]] = []
    num_kept = 0
    is_lines = out.suffix == ".jsonl"
    with files.writing(out) as temporary, files.appending(temporary) as file:
        for source in report.files:
            for number, raw in read_rows(source):
                if (source, number) in faults:
                    row_id = raw.get("id") if isinstance(raw, dict) else None
                    dropped.append({"file": source, "row": number, "id": row_id, "problems": faults[source, number]})
                    continue
                if (source, number) in renamed:
                    raw = {**raw, "id": f"{raw['id']}-row{number}"}
                file.write(("\n" if is_lines else ",\n ") if num_kept else "" if is_lines else "[\n ")
                file.write(_as_text(raw, source, number))
                num_kept += 1
        file.write("\n" if is_lines else "\n]\n" if num_kept else "[]\n")
        files.write_text(dropped_path(out), json.dumps(dropped, indent=1, default=str) + "\n")
    return num_kept, len(dropped)


def _as_text(raw: Any, source: str, number: int) -> str:
    try:
        return json.dumps(raw)
    except TypeError:
        raise DataError(
            f"{source}: row {number} holds an embedded picture, which a JSON file cannot. Skip bad rows in training instead: "
            "data.on_bad_row=skip data.on_bad_image=skip."
        ) from None
