"""What a machine can hold and how fast it computes: a table of GPUs, and this machine's own figures."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from vir_hf.errors import RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        label: what it is called in a table.
        kind: `"cuda"` or `"cpu"`.
        memory_bytes: what the card reports as its total; 0 if unknown.
        tflops: dense 16-bit matrix multiplications with fp32 sums, from the maker's data sheet; 0 if unknown.
        has_bf16: otherwise fp16 with loss scaling.
        link_gbps: gigabytes a second one way between GPUs of one machine.
    """

    label: str
    kind: str
    memory_bytes: int
    tflops: float
    has_bf16: bool = True
    link_gbps: float = 12.0


def _gpu(label: str, mebibytes: int, tflops: float, link_gbps: float = 12.0, has_bf16: bool = True) -> Device:
    return Device(label, "cuda", mebibytes * 2**20, tflops, has_bf16, link_gbps)


# Memory as nvidia-smi reports it. Links: PCIe 3 or 4 x16 in practice, NVLink of the SXM cards.
GPUS: dict[str, Device] = {
    "t4": _gpu("T4", 15360, 65, has_bf16=False),
    "v100": _gpu("V100 32 GB", 32768, 125, 120, has_bf16=False),
    "3090": _gpu("RTX 3090", 24576, 71),
    "4090": _gpu("RTX 4090", 24564, 165),
    "a10g": _gpu("A10G", 23028, 70),
    "l4": _gpu("L4", 23034, 121),
    "a100-40": _gpu("A100 40 GB", 40960, 312, 240),
    "a100-80": _gpu("A100 80 GB", 81920, 312, 240),
    "h100": _gpu("H100 80 GB", 81559, 989, 360),
    "h200": _gpu("H200", 143771, 989, 360),
}
# Gigabytes a second one way between machines: 200 Gbit/s.
NODE_LINK_GBPS = 25.0
# Share of the data sheet's rate that fine-tuning reaches; measured rates replace it.
ASSUMED_UTILISATION = 0.40
# fp32 on one CPU core with AVX2; --measure gives this machine's own.
_CPU_TFLOPS_A_CORE = 0.04


def device_named(name: str) -> Device:
    """Return a device of the table, or `cpu` for a CPU of this machine's size.

    Raises:
        RecipeError: the name is not in the table.
    """
    wanted = name.lower().replace("rtx", "").strip(" -_")
    if wanted == "cpu":
        return cpu_device()
    if wanted not in GPUS:
        raise RecipeError(
            f"--gpu {name}: unknown; expected one of {', '.join([*GPUS, 'cpu'])}. For another card say --memory 24GB."
        )
    return GPUS[wanted]


def cpu_device() -> Device:
    """This machine's CPU and the memory that processes may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(f"CPU, {cores} cores", "cpu", total_memory(), _CPU_TFLOPS_A_CORE * cores, link_gbps=5.0)


def this_device(use_cpu: bool = False) -> Device:
    """The GPU of this process, or the CPU where there is none."""
    if use_cpu or not torch.cuda.is_available():
        return cpu_device()
    name = torch.cuda.get_device_name()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    likely = [gpu for key, gpu in GPUS.items() if key.split("-")[0] in words]
    near = min(likely, key=lambda gpu: abs(gpu.memory_bytes - total), default=None)
    has_bf16 = torch.cuda.get_device_capability()[0] >= 8
    return Device(name, "cuda", total, near.tflops if near else 0.0, has_bf16, near.link_gbps if near else 12.0)


def free_memory(device: Device) -> int:
    """Bytes a new run could use now: of this process's GPU, or of this machine's memory."""
    if device.kind == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    available = _meminfo("MemAvailable")
    return min(available, total_memory()) if available else total_memory()


def total_memory() -> int:
    """Bytes of this machine's memory, or of the container's limit if that is lower; 0 if unknown."""
    total = _meminfo("MemTotal")
    if not total and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit_file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text)) if total else int(text)
    return total


def _meminfo(field: str) -> int:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_memory(text: str) -> int:
    """Return bytes for `24GB` (10^9), `24GiB` (2^30), `800MB` or a plain number of bytes.

    Raises:
        RecipeError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = found[2].removesuffix("b") if found else "?"
    factor = {**_UNITS, **_BINARY_UNITS}.get(unit)
    if found is None or factor is None or float(found[1]) <= 0:
        raise RecipeError(f"--memory {text}: expected an amount such as 24GB, 23.5GiB or 800MB.")
    return int(float(found[1]) * factor)


def measure_tflops(device: Device, seconds: float = 0.5) -> float:
    """Return the rate of square matrix multiplications on this machine, in the precision training would use.

    Source: the usual ceiling for model FLOP utilisation; takes about `seconds`.
    """
    on_gpu = device.kind == "cuda" and torch.cuda.is_available()
    dtype = (torch.bfloat16 if device.has_bf16 else torch.float16) if on_gpu else torch.float32
    n = 4096 if on_gpu else 1024
    a = torch.randn(n, n, device="cuda" if on_gpu else "cpu").to(dtype)
    b = a.clone()

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run(2)
    count = max(2, math.ceil(seconds / 2 / max(run(2) / 2, 1e-6)))
    return 2 * n**3 * count / run(count) / 1e12


_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 2**18


def return_freed_tensors(threshold_bytes: int = _MMAP_THRESHOLD_BYTES) -> bool:
    """Make freed tensors on the CPU go back to the system at once; true if this C library can do it.

    glibc raises the size from which it asks the system for memory up to 32 MiB as a program runs. The activations of a
    small model then lie in a heap that fragments: resident memory measured 31 % above what the tensors hold (SmolLM's
    width, ten layers, 1,400 tokens, LoRA), against 3 % with the limit held at 256 KiB. Affects this process only.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, threshold_bytes) == 1
