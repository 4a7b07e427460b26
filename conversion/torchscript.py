"""Reads the parameters of a TorchScript archive as data.

`torch.jit.load` compiles and may run the archive's code. But an archive is a zip file whose `data.pkl` describes the
tree of modules as plain objects with tensors for attributes, each tensor's bytes lying in an entry of its own; so a
pickle reader that knows tensors, and takes every module for a bag of attributes, sees all there is to convert.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_MAX_MODULES = 1 << 16


def is_torchscript(path: Path) -> bool:
    """Whether a zip file is a TorchScript archive: unlike a saved state dict it holds constants."""
    with zipfile.ZipFile(path) as archive:
        return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """
    Collect the parameters and buffers of a TorchScript archive.

    Returns:
        The tensors by the names that `state_dict` would give them.

    Raises:
        pickle.UnpicklingError: if the archive's pickle asks for anything but tensors, lists and modules.
    """
    with zipfile.ZipFile(path) as archive:
        data = next(name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl")
        root = _ModuleUnpickler(archive, data).load()
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, module) in enumerate(_modules(root, "")):
        if number == _MAX_MODULES:  # modules within one another double with each line
            raise pickle.UnpicklingError("more modules than any model has")
        values = vars(module).items()
        tensors |= {name + attribute: value for attribute, value in values if isinstance(value, torch.Tensor)}
    return tensors


class _Module:
    """Stands for a module of the archive, whatever its class: a bag of attributes."""


def _as_list(values: Any) -> list[Any]:
    return list(values)


def _untagged(value: Any, type_name: str) -> Any:
    return value


def _view(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    # Unlike `set_`, `as_strided` refuses to reach beyond the storage.
    return torch.as_strided(storage, size, stride, offset)


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch.jit._pickle", "build_intlist"): _as_list,
    ("torch.jit._pickle", "build_doublelist"): _as_list,
    ("torch.jit._pickle", "build_boollist"): _as_list,
    ("torch.jit._pickle", "build_tensorlist"): _as_list,
    ("torch.jit._pickle", "restore_type_tag"): _untagged,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _ModuleUnpickler(pickle.Unpickler):
    """An unpickler that finds nothing but what `_KNOWN` lists, and `_Module` for the archive's own classes."""

    def __init__(self, archive: zipfile.ZipFile, data: str):
        super().__init__(io.BytesIO(_check_memo(archive.read(data))))
        self._archive = archive
        self._folder = data.removesuffix(".pkl")
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, _, length = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._folder}/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key][:length]


def _modules(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """A module and all within it, each with what the names of its attributes begin with."""
    yield prefix, module
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _modules(value, f"{prefix}{name}.")


def _check_memo(data: bytes) -> bytes:
    """Refuse a pickle that numbers what it remembers so that the reader makes room for billions."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(data):
            raise pickle.UnpicklingError("it remembers more than it holds")
    return data
