"""The headers of a model's weight files: which tensors there are, of what type and size, and where.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header, JSON:
{"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ..}, offsets from the header's end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from grape_service.config.policy import PolicyConfig
from grape_service.display import short
from grape_service.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, PICKLE_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 16 * 2**20
COMPARED_BYTES = 256 * 2**20
"""Two tensors up to this size are compared whole, larger ones in places."""

TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
"""dtype -> unsigned type of the same size, bits of the exponent: all are 1 in infinity and NaN."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a weight file."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    file: Path
    start: int  # byte of the file at which its values begin
    num_bytes: int

    @property
    def torch_dtype(self) -> str:
        """Its type's name in torch; of a type that this does not know, one of that size."""
        return TORCH_DTYPES.get(self.dtype, "uint8")


def weight_file_names(folder: Path) -> list[str]:
    """The weight files that a model is loaded from, in the order of their names; empty where there are none.

    Raises UserError where an index and a single file tell of different models, or an index cannot be read.
    """
    for index, single in ((INDEX, SINGLE), (PICKLE_INDEX, PICKLE_SINGLE)):
        has_single = (folder / single).is_file()
        if (folder / index).is_file():
            names = sorted(set(_index(folder / index).values()))
            if has_single and names != [single]:
                raise UserError(
                    f"{folder} holds both {single} and {index}, which names other files: remove the one not meant"
                )
            return names
        if has_single:
            return [single]
    return []


def is_pickle(name: str) -> bool:
    """Whether a weight file is one that can run code when it is read."""
    return Path(name).suffix in (".bin", ".pt", ".pth")


def read_headers(folder: Path, policy: PolicyConfig) -> dict[str, TensorHeader]:
    """Every tensor of the files that the model is loaded from, by name.

    Raises UserError for files that are missing, damaged or not complete, and where the index names other tensors.
    """
    headers: dict[str, TensorHeader] = {}
    names = weight_file_names(folder)
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"model '{policy.model}': its index names the weight file {name}, which is not there")
        found = pickle_headers(path) if is_pickle(name) else file_headers(path)
        double = sorted(set(found) & set(headers))
        if double:
            raise UserError(
                f"model '{policy.model}': {double[0]} is both in {headers[double[0]].file.name} and in {name}"
            )
        headers.update(found)
    if (folder / INDEX).is_file() and names and not is_pickle(names[0]):
        _compare_with_index(_index(folder / INDEX), headers, policy)
    if not headers:
        raise UserError(
            f"model '{policy.model}' has no weights: its folder needs model.safetensors, or an index of parts"
        )
    return headers


def _index(path: Path) -> dict[str, str]:
    try:
        value = orjson.loads(path.read_bytes())
        weight_map = value["weight_map"]
        assert isinstance(weight_map, dict)
    except (orjson.JSONDecodeError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path} is not an index of weight files: it holds no weight_map") from None
    for name in weight_map.values():
        if Path(str(name)).name != name:
            raise UserError(f"{path} names the weight file '{name}', which does not lie in the same folder")
    return weight_map


def _compare_with_index(index: dict[str, str], headers: dict[str, TensorHeader], policy: PolicyConfig) -> None:
    for name, file in index.items():
        if name not in headers or headers[name].file.name != file:
            raise UserError(f"model '{policy.model}': its index has {name} in {file}, which does not hold it")
    extra = sorted(set(headers) - set(index))
    if extra:
        raise UserError(
            f"model '{policy.model}': {headers[extra[0]].file.name} holds {extra[0]}, which its index does not name"
        )


def file_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file. Raises UserError where it is damaged, cut or a pointer of Git LFS."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start + file.read(len(LFS_POINTER) - 8) == LFS_POINTER:
            raise UserError(f"{path} is a pointer of Git LFS and not the weights: run git lfs pull there")
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (MAX_HEADER_BYTES + 1,)
        file.seek(8)
        try:
            header = orjson.loads(file.read(length)) if length <= min(size, MAX_HEADER_BYTES) else None
        except orjson.JSONDecodeError:
            header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file, or it is damaged: copy it again")
    found = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = tensor["data_offsets"]
            dtype, shape = str(tensor["dtype"]), tuple(tensor["shape"])
            is_valid = 0 <= begin <= end and all(type(size) is int and size >= 0 for size in shape)
        except (KeyError, TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise UserError(f"{path} is not a safetensors file, or it is damaged, at {short(name)}: copy it again")
        if 8 + length + end > size:
            raise UserError(f"{path} ends before its weight {short(name)} does: copy the file again")
        found[name] = TensorHeader(dtype, shape, path, 8 + length + begin, end - begin)
    return found


def pickle_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a pickle file that the config allows; torch reads it without running what it holds."""
    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # whatever a pickle raises
        raise UserError(f"{path} cannot be read as weights alone: {str(error).splitlines()[0][:150]}") from None
    names = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
    return {
        name: TensorHeader(names.get(str(value.dtype).removeprefix("torch."), "U8"), tuple(value.shape), path, 0, 0)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


# Values


def value_problem(header: TensorHeader) -> str | None:
    """What is wrong with a tensor's values in words: not finite; None where nothing is, or the type has no infinity."""
    if header.dtype not in EXPONENTS or not header.num_bytes:
        return None
    kind, exponent = EXPONENTS[header.dtype]
    mask = np.array(exponent, dtype=kind)
    for values in _chunks(header, np.dtype(kind)):
        bad = (values & mask) == mask
        if bad.any():
            return "values that are not finite (NaN or infinity)"
    return None


def same_values(left: TensorHeader, right: TensorHeader) -> bool:
    """Whether two tensors hold the same bytes; of large ones, in 64 places."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if not left.num_bytes:  # of a pickle: not looked at
        return True
    one, other = (np.memmap(h.file, np.uint8, "r", h.start, (h.num_bytes,)) for h in (left, right))
    if left.num_bytes <= COMPARED_BYTES:
        return bool(np.array_equal(one, other))
    starts = np.linspace(0, left.num_bytes - 65536, 64).astype(np.int64)
    return all(bool(np.array_equal(one[s : s + 65536], other[s : s + 65536])) for s in starts)


def _chunks(header: TensorHeader, kind: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    step = CHUNK_BYTES // kind.itemsize
    total = header.num_bytes // kind.itemsize
    for start in range(0, total, step):
        count = min(step, total - start)
        yield np.fromfile(header.file, kind, count, offset=header.start + start * kind.itemsize)
