"""What a checkpoint's weight files hold, most of it told from their headers before a model is made of them.

A configuration can ask for any size, and transformers sets the memory aside and fills it before it says that the file
holds something else. So names, shapes and types are compared first, on the meta device, which costs nothing.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from moeclip_hf.errors import CheckpointError

# In the order in which transformers looks for them.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES = (*SAFETENSORS, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# How the names of what a MoECLIP has beside its CLIP begin.
MOECLIP_PARTS = ("moe_layers.", "text_adapter.", "patch_projection.", "depthwise_adapter.")

# The types that weights may have, by their names in safetensors' headers.
WEIGHT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# How many names of a kind an error lists.
_MAX_LISTED = 8
_MAX_SHOWN = 300


class StoredTensor(NamedTuple):
    """What a header tells of a tensor; a type that is no floating-point one is told by its name in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


Described: TypeAlias = Mapping[str, StoredTensor] | Mapping[str, torch.Tensor]


def read_headers(folder: Path, names: Sequence[str] = WEIGHT_FILES) -> dict[str, StoredTensor]:
    """
    Read names, shapes and types of all tensors of a folder, from the files that transformers would load.

    Args:
        folder: of a model or an adapter; safetensors, in one file or several, or PyTorch files.
        names: as of [`weight_files`].

    Raises:
        CheckpointError: as [`weight_files`] does, or if a file is damaged or would run code.
    """
    headers: dict[str, StoredTensor] = {}
    for part in weight_files(folder, names):
        if part.suffix == ".json":
            continue
        try:
            headers |= _read_header(part)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{part} {describe_unpickling(error)}") from error
        except Exception as error:  # whatever a missing or damaged file leads to
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{part}: is missing, damaged or cut short ({reason}): fetch it anew.") from error
    return headers


def read_tensors(folder: Path, names: Sequence[str] = SAFETENSORS) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Read a folder's weights, one tensor at a time in memory.

    Args:
        folder: of a model or an adapter, whose headers were read.
        names: as of [`weight_files`], of safetensors alone.
    """
    for part in weight_files(folder, names):
        if part.suffix == ".safetensors":
            with safe_open(part, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    yield name, tensors.get_tensor(name)


def weight_files(folder: Path, names: Sequence[str] = WEIGHT_FILES) -> list[Path]:
    """
    Find the files that transformers would load a folder's weights from: one, or an index and those that it names.

    Args:
        folder: of a model or an adapter.
        names: of the file or index, the first of which that is there is taken.

    Raises:
        CheckpointError: there are none, or two sets of them, or an index is none or names files elsewhere.
    """
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: holds no weights: {names[0]} is missing.")
    index = folder / f"{file.name}.index.json"
    if index.is_file():  # saving in several files leaves the one that was there
        raise CheckpointError(
            f"{folder}: holds weights twice, in {file.name} and in the files of {index.name}: delete those that are "
            "out of date."
        )
    return [file, *_indexed_files(file)] if file.suffix == ".json" else [file]


def describe_unpickling(error: pickle.UnpicklingError) -> str:
    """Say of a file, in words that go on from its name, why its pickle was not read."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        return "is damaged or cut short: fetch it anew."
    return f"holds {found[1]}, not only tensors; it is not read, as that would run code from the file."


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: is no index of weights: fetch it anew.") from error
    for name in names:
        if name != Path(name).name:
            raise CheckpointError(f"{index}: names {name!r}, which is not in its own folder; it is not read.")
    return [index.parent / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: StoredTensor(tuple(part.get_shape()), WEIGHT_DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    content = torch.load(file, map_location="meta", weights_only=True)
    if lacking := [name for name, tensor in content.items() if not holds_its_numbers(tensor)]:
        raise ValueError(list_faults({"of fewer numbers than their shape": lacking}))
    return {name: StoredTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}


def holds_its_numbers(tensor: torch.Tensor) -> bool:
    """Whether there is a number for every place: sparse and expanded tensors of any size fit a small file."""
    if tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def expected_tensors(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Names and shapes of a model's weights, without memory behind them."""
    with torch.device("meta"):
        return model_class(config).state_dict()


def check_weights(
    source: str,
    headers: Mapping[str, StoredTensor],
    model_class: type[PreTrainedModel],
    config: Any,
    other_parts: Collection[str] = (),
) -> list[str]:
    """
    Refuse weights that are not a model's, before the model is made.

    Args:
        source: names the checkpoint in errors.
        headers: of [`read_headers`].
        model_class, config: what the weights are to be loaded to; a CLIP's or a MoECLIP's.
        other_parts: how names begin of weights that do not matter, whatever they are.

    Returns:
        The names of the weights that are missing, sorted.

    Raises:
        CheckpointError: the configuration asks for what cannot be, or lists unknown and misshapen weights, and those
            that are no floating-point numbers.
    """
    stored = {name: tensor for name, tensor in headers.items() if not name.startswith(tuple(other_parts))}
    try:
        faults = weight_faults(stored, model_class, config)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    missing = faults.pop("missing")
    if listed := list_faults(faults):
        raise CheckpointError(f"{source}: does not fit its configuration: {listed}.")
    return missing


def weight_faults(
    headers: Mapping[str, StoredTensor], model_class: type[PreTrainedModel], config: Any
) -> dict[str, list[str]]:
    """Compare stored weights with a model's, as [`find_faults`] does; `CheckpointError` if there can be no model."""
    asked = max(config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers)
    if asked > len(headers):  # building a model takes time in its depth, be it on the meta device
        raise CheckpointError(f"its configuration asks for {asked} blocks, and it holds {len(headers)} weights.")
    try:
        expected = expected_tensors(model_class, config)
    except Exception as error:  # whatever a configuration that nobody checked leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"no model can be made as its configuration says: {reason}") from error
    return find_faults({name: tensor for name, tensor in headers.items() if not _is_index(name)}, expected)


def _is_index(name: str) -> bool:
    """Whether this holds positions' indices, which checkpoints of old versions have beside their weights."""
    return name.endswith(".embeddings.position_ids")


def find_faults(tensors: Described, expected: Described) -> dict[str, list[str]]:
    """
    Compare tensors with those that are expected: what is unknown, missing, misshapen or of another type.

    Args:
        tensors: those that are there, by name.
        expected: those of the model, under the same names, on any device (the meta device will do).
    """
    shared = [key for key in sorted(tensors) if key in expected]
    return {
        "unknown": sorted(set(tensors) - set(expected)),
        "missing": sorted(set(expected) - set(tensors)),
        "misshapen": [
            f"{key}: {tuple(tensors[key].shape)}, not {tuple(expected[key].shape)}"
            for key in shared
            if tuple(tensors[key].shape) != tuple(expected[key].shape)
        ],
        "of another type": [
            f"{key}: {tensors[key].dtype}" for key in shared if tensors[key].dtype not in WEIGHT_DTYPES.values()
        ],
    }


def list_faults(faults: Mapping[str, Iterable[str]]) -> str:
    """Say how many entries are faulty in each way, and name the first of them; nothing where there are none."""
    parts = []
    for kind, entries in faults.items():
        entries = list(entries)
        if not entries:
            continue
        listed = ", ".join(map(_shown, entries[:_MAX_LISTED]))
        rest = f" and {len(entries) - _MAX_LISTED} more" if len(entries) > _MAX_LISTED else ""
        parts.append(f"{len(entries)} {kind} ({listed}{rest})")
    return "; ".join(parts)


def _shown(entry: str) -> str:
    return entry if entry.isprintable() and len(entry) <= _MAX_SHOWN else ascii(entry[:_MAX_SHOWN])


def digest_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of named weights, in any order, 32 hexadecimal digits."""

    def digest(named: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = named
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(name.encode() + b"\0" + hashlib.sha256(values.data).digest()).digest()

    with ThreadPoolExecutor() as threads:  # hashing leaves other threads to run
        digests = threads.map(digest, sorted(tensors.items()))
        return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite, told from the extremes: NaN is both, and nothing is allocated."""
    return all(extreme.isfinite() for extreme in tensor.aminmax())


def refuse_non_finite(source: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that hold NaN or infinity, by name; offloaded ones, on the meta device, are not looked at."""
    faulty = [
        name for name, tensor in tensors if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor)
    ]
    if faulty:
        raise CheckpointError(f"{source}: holds NaN or infinity: {list_faults({'non-finite': faulty})}.")
