"""Opens checkpoint files without running what is in them."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moeclip_hf.conversion.key_table import refuse
from moeclip_hf.conversion.torchscript import is_torchscript, read_torchscript
from moeclip_hf.errors import ConversionError
from moeclip_hf.stored_weights import describe_unpickling, holds_its_numbers

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_LFS_MAGIC = b"version https://git-lfs"
# What a Hub id looks like: a name, or an owner and a name.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Weights are stored as they are, and code may be packed; what unpacks to more times its size was made to.
_MAX_PACKING = 20
_SMALL_ARCHIVE = 1 << 26
_WEIGHT_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors"}


def describe(source: Any, otherwise: str) -> str:
    """Name a source in errors: a path by itself, what is in memory by `otherwise`."""
    return str(source) if isinstance(source, (str, Path)) else otherwise


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_repository(source: str | Path) -> bool:
    """Whether a source is a folder or, not being there, has the form of a Hub id rather than of a file's path."""
    path = Path(source)
    if path.exists():
        return path.is_dir()
    return path.suffix not in _WEIGHT_SUFFIXES and bool(_HUB_ID.fullmatch(str(source)))


def read_tensors(source: str | Path | Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Read a flat mapping of names to tensors, from a file or memory; `name` is the source's in errors."""
    content = read_checkpoint(source) if isinstance(source, (str, Path)) else source
    check_entries(content, name)
    return dict(content)


def check_entries(entries: Mapping[Any, Any], source: str) -> None:
    """Refuse entries that are not a name and a tensor each, one that is dense and has a number for every place."""
    tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
    refuse(
        source,
        {
            "non-tensor": [str(key) for key in entries if key not in tensors],
            "without a name": [repr(key) for key in entries if not isinstance(key, str)],
            "of fewer numbers than their shape": [
                f"{key}: {tuple(tensor.shape)}"
                for key, tensor in tensors.items()
                if tensor.is_meta or not holds_its_numbers(tensor)
            ],
        },
    )


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """
    Read a checkpoint file: a PyTorch file (`.pt`, `.pth`, `.bin`), a TorchScript archive or safetensors.

    What a file is, is told from its first bytes, not from its name. Code in it is never run: pickles are read by
    unpicklers that know tensors and plain containers alone.

    Args:
        path (`str` or `Path`)

    Returns:
        The mapping that was saved; of a TorchScript archive, its parameters and buffers by name.

    Raises:
        ConversionError: if the file is missing, empty, damaged, no checkpoint, or holds more than tensors and plain
            data.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path}: no such file." if not path.exists() else f"{path} is a folder, not a file.")
    with path.open("rb") as file:
        head = file.read(64)
    try:
        content = _read(path, head)
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path} {describe_unpickling(error)}") from error
    except Exception as error:  # the readers raise whatever a damaged file leads them to
        raise ConversionError(f"{path} is damaged or cut short ({one_line(error)}): fetch it anew.") from error
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a mapping of names to tensors.")
    return content


def _read(path: Path, head: bytes) -> Any:
    if not head:
        raise ConversionError(f"{path} is empty: fetch it anew.")
    if head.startswith(_LFS_MAGIC):
        raise ConversionError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`.")
    if head.startswith(_ZIP_MAGIC):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > _MAX_PACKING * path.stat().st_size + _SMALL_ARCHIVE:
                raise ConversionError(f"{path} would unpack to {unpacked:,} bytes, as no checkpoint does: not read.")
            if archive.testzip() is not None:  # checksums, which torch.load does not look at
                raise ConversionError(f"{path} is damaged: fetch it anew.")
        return read_torchscript(path) if is_torchscript(path) else _read_pickled(path)
    if head.startswith(_PICKLE_MAGIC):
        return _read_pickled(path)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConversionError(f"{path} is no valid safetensors file ({error}): fetch it anew.") from error
    # Last, as the header's length that begins a safetensors file can look like anything.
    if head.lstrip().startswith(b"<"):
        raise ConversionError(f"{path} is a web page, not a checkpoint: the download failed, fetch it anew.")
    raise ConversionError(
        f"{path} is neither a PyTorch file (.pt, .pth, .bin), a TorchScript archive nor safetensors."
    )


def _read_pickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
