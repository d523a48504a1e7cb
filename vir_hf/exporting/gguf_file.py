"""One GGUF file: keys first, then tensors in the type that each is kept in, one at a time in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vir_hf import files
from vir_hf.errors import RecipeError

# The word of `--type` -> general.file_type and the type of large weights; those that the gguf package writes itself.
QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
_LARGEST_F16 = 65504.0


def gguf_package() -> Any:
    """Return the gguf package.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise RecipeError(
            "--to gguf: the package gguf is not installed. pip install 'vir-hf[export]', or pip install gguf."
        ) from error
    return gguf


class GgufFile:
    """A GGUF file in the making: `writer` takes the keys, `add` the tensors, `write` writes both.

    Args:
        arch: general.architecture.
        quantization: one of `QUANTIZATIONS`.
    """

    def __init__(self, arch: str, quantization: str) -> None:
        self.gguf = gguf_package()
        self.quantization = quantization
        self.writer = self.gguf.GGUFWriter(None, arch)
        self.writer.add_file_type(self.gguf.LlamaFileType[_FILE_TYPES[quantization]])
        self.writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        self._tensors: list[tuple[str, Any, Callable[[], torch.Tensor]]] = []

    def add(self, name: str, shape: tuple[int, ...], read: Callable[[], torch.Tensor], kept: str | None = None) -> None:
        """Add a tensor, which is read when the file is written.

        Args:
            kept: its type; by default fp32 for vectors and the file's own for matrices, or f16 where rows are no whole blocks.
        """
        types = self.gguf.GGMLQuantizationType
        wanted = kept or (kept_as(self.quantization, shape[-1]) if len(shape) > 1 else "f32")
        self._tensors.append((name, types[wanted.upper()], read))
        itemsize = {"f32": 4, "f16": 2}.get(wanted)
        if itemsize:
            dtype = np.dtype(np.float32 if wanted == "f32" else np.float16)
            self.writer.add_tensor_info(name, list(shape), dtype, int(np.prod(shape)) * itemsize)
        else:
            in_bytes = self.gguf.quant_shape_to_byte_shape(shape, types[wanted.upper()])
            self.writer.add_tensor_info(
                name, list(in_bytes), np.dtype(np.uint8), int(np.prod(in_bytes)), raw_dtype=types[wanted.upper()]
            )

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            RecipeError: a weight that its type cannot hold.
        """
        with files.writing(path) as temporary:
            self.writer.write_header_to_file(temporary)
            self.writer.write_kv_data_to_file()
            self.writer.write_ti_data_to_file()
            for name, kept, read in self._tensors:
                self.writer.write_tensor_data(self._stored(name, kept, read()))
            self.writer.close()

    def _stored(self, name: str, kept: Any, value: torch.Tensor) -> np.ndarray:
        wide = value.to(torch.float32).contiguous()
        if not torch.isfinite(wide).all():
            raise RecipeError(
                f"--to gguf: {name} holds a value that is no number; the run has to be trained again, or from before."
            )
        if kept == self.gguf.GGMLQuantizationType.F16 and float(wide.abs().max()) > _LARGEST_F16:
            raise RecipeError(f"--to gguf: {name} holds values that f16 cannot; use --type bf16 or f32.")
        array: np.ndarray = self.gguf.quants.quantize(wide.numpy(), kept)
        return array


def kept_as(quantization: str, row: int) -> str:
    """Return the type of a matrix whose rows have `row` values: f16 where they are no whole blocks of the wanted one."""
    gguf = gguf_package()
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantization.upper()]]
    return "f16" if row % block else quantization


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the keys of a GGUF file and its tensors in fp32, in the shapes that torch gives them."""
    gguf = gguf_package()
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
    return fields, tensors
