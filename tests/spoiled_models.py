"""Folders and files of models that are made to lie, what is to be said of them, and a payload that leaves a trace."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moeclip_hf.errors import CheckpointError

HUGE = 10**9
WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
PROJECTION = "text_adapter.projection.weight"

Spoil = Callable[[Path], Any]


def assert_told(error: CheckpointError, path: Path) -> None:
    message = str(error)
    assert str(path) in message
    assert "\n" not in message
    assert "allocate" not in message and "MemoryError" not in message, "it was refused for lack of memory alone"


def settings(file: str, **changes: Any) -> Spoil:
    """Set what a file of JSON says; `a__b` is b within a."""

    def spoil(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        for path, value in changes.items():
            *outer, name = path.split("__")
            place = document
            for key in outer:
                place = place[key]
            place[name] = value
        (folder / file).write_text(json.dumps(document))

    return spoil


def config(**changes: Any) -> Spoil:
    return settings("config.json", **changes)


def processor(**changes: Any) -> Spoil:
    return settings("processor_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return spoil


def content(file: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def moved_out(folder: Path, file: str) -> Path:
    outside = folder.parent / f"outside-{file}"
    (folder / file).rename(outside)
    return outside


def linked_out(file: str) -> Spoil:
    return lambda folder: (folder / file).symlink_to(moved_out(folder, file))


def linked_to(file: str, target: str) -> Spoil:
    return lambda folder: ((folder / file).unlink(), (folder / file).symlink_to(target))


def pipe(file: str) -> Spoil:
    return lambda folder: ((folder / file).unlink(), os.mkfifo(folder / file))


def indexed_outside(folder: Path) -> None:
    outside = moved_out(folder, WEIGHTS)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(outside), f"../{outside.name}")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / "decoy.safetensors").touch()


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)
