"""Let PyPI's torchvision, a CUDA build, be imported beside a CPU build of torch: declare the operators it registers shapes for.

python mend_torchvision.py     with the Python of the environment whose torchvision is to be mended
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

MARK = "# declared for a CPU build of torch"
LINES = f"""{MARK}
from torch import library as _library

_declared = _library.Library("torchvision", "DEF")
_declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

"""

if __name__ == "__main__":
    found = importlib.util.find_spec("torchvision")
    if found is not None and found.origin is not None:
        path = Path(found.origin)
        text = path.read_text()
        if MARK not in text:
            path.write_text(LINES + text)
