"""What `vir-hf doctor` looks at when no recipe is named: whether this installation can train here, and what it lacks for more."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from vir_hf.console import memory

# Less than this beside the cache of the Hub, and a 7B model does not fit; less shared memory, and data loaders' workers die.
_ENOUGH_DISK = 30 * 2**30
_ENOUGH_SHARED = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        state: `ok`; `missing`, where something optional is not there; `wrong`, where training here would fail.
        found: what is there.
        remedy: what to type or change; empty where all is well.
    """

    name: str
    state: Literal["ok", "missing", "wrong"]
    found: str
    remedy: str = ""


def look() -> list[Finding]:
    """Return everything that is looked at, in the order in which one would mend it."""
    return [*_packages(), _torch(), *_extras(), _images(), *_disks(), *_shared_memory(), _hub()]


def _packages() -> Iterator[Finding]:
    """Every required package against the bounds that this version was tried with."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in metadata.requires("vir-hf") or []]
    except metadata.PackageNotFoundError:
        yield Finding("vir-hf", "missing", "not installed, read from a folder", "pip install -e .")
        return
    wrong = []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement, found))
    for requirement, found in wrong:
        command = f"pip install '{requirement.name}{requirement.specifier}'"
        yield Finding(requirement.name, "wrong", f"{found}, expected {requirement.specifier}", command)
    if not wrong:
        yield Finding("required packages", "ok", f"{len(required)} requirements, each in a version that was tried")


def _torch() -> Finding:
    """Whether torch was built for the GPU that is here."""
    import torch

    version = torch.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{torch.cuda.device_count()} x {properties.name}, {memory(properties.total_memory)}"
        wanted = f"sm_{properties.major}{properties.minor}"
        architectures = torch.cuda.get_arch_list()
        # A binary for 8.0 runs on 8.6, and one for compute_ is compiled when it is loaded.
        same_major = any(name.startswith(f"sm_{properties.major}") for name in architectures)
        if architectures and not same_major and not any(name.startswith("compute_") for name in architectures):
            remedy = "install a build for this GPU: https://pytorch.org/get-started/locally"
            return Finding("torch", "wrong", f"{version} has no kernels for {gpu} ({wanted})", remedy)
        return Finding("torch", "ok", f"{version}, {gpu}")
    if not _has_nvidia_gpu():
        return Finding("torch", "ok", f"{version}, no GPU: training uses the CPU")
    if torch.version.cuda is None:
        remedy = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        return Finding("torch", "wrong", f"{version} is built for the CPU, and this machine has an NVIDIA GPU", remedy)
    remedy = f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, or look whether CUDA_VISIBLE_DEVICES hides the GPU"
    return Finding("torch", "wrong", f"{version} (CUDA {torch.version.cuda}) does not reach the NVIDIA GPU", remedy)


def _has_nvidia_gpu() -> bool:
    """Whether the driver knows of a GPU; a container without access to it shows none."""
    gpus = Path("/proc/driver/nvidia/gpus")
    return gpus.is_dir() and any(gpus.iterdir())


def _extras() -> Iterator[Finding]:
    """Packages that a kind of run needs and an ordinary one does not."""
    wanted = (
        ("bitsandbytes", "QLoRA and 8-bit weights", "pip install 'vir-hf[gpu]'"),
        ("deepspeed", "ZeRO on several GPUs", "pip install 'vir-hf[gpu]'"),
        ("gradio", "the demo", "pip install 'vir-hf[space]'"),
    )
    for name, purpose, remedy in wanted:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"not installed; needed for {purpose}", remedy)
            continue
        is_whole = util.find_spec(name) is not None
        repair = "" if is_whole else f"pip install --force-reinstall {name}"
        yield Finding(
            name, "ok" if is_whole else "wrong", version if is_whole else f"{version}, files are gone", repair
        )


def _images() -> Finding:
    from vir_hf.images.preprocessing import what_is_slow

    slow = what_is_slow()
    if slow:
        return Finding("fast images", "missing", slow, "pip install 'vir-hf[fast]'")
    return Finding("fast images", "ok", "decoded by simplejpeg, resized by numba's kernels")


def _disks() -> Iterator[Finding]:
    """Room where models are downloaded to, and where a run is written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"downloads": (Path(HF_HUB_CACHE), "HF_HOME"), "outputs": (Path.cwd(), "training.output_dir")}
    for name, (place, key) in places.items():
        there = next(parent for parent in [place, *place.parents] if parent.is_dir())
        free = shutil.disk_usage(there).free
        enough = free >= _ENOUGH_DISK
        remedy = (
            "" if enough else f"a 7B model and its checkpoints need {memory(_ENOUGH_DISK)}: make room, or set {key}"
        )
        yield Finding(f"disk for {name}", "ok" if enough else "missing", f"{memory(free)} free in {place}", remedy)
        if not os.access(there, os.W_OK):
            yield Finding(
                f"disk for {name}", "wrong", f"{there} cannot be written to", f"set {key} to a folder of yours"
            )


def _shared_memory() -> Iterator[Finding]:
    """What data loaders' workers hand their batches over in; containers often have 64 MiB of it."""
    place = Path("/dev/shm")
    if sys.platform != "linux" or not place.is_dir():
        return
    size = shutil.disk_usage(place).total
    enough = size >= _ENOUGH_SHARED
    remedy = "" if enough else "start the container with --shm-size=8g, or set training.dataloader_num_workers=0"
    yield Finding("shared memory", "ok" if enough else "missing", memory(size), remedy)


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return Finding("Hugging Face Hub", "ok", "offline (HF_HUB_OFFLINE): nothing is downloaded or published")
    if get_token() is None:
        return Finding(
            "Hugging Face Hub", "missing", "no token; needed to publish and for gated models", "hf auth login"
        )
    return Finding("Hugging Face Hub", "ok", "a token is stored; `hf auth whoami` asks the Hub whose it is")
