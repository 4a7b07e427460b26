"""What an interrupted evaluation leaves behind, so that it can go on: its settings, and a file a scored batch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from moeclip_hf.errors import MoECLIPError
from moeclip_hf.evaluation.scoring import ScoredBatch

_SETTINGS_FILE = "settings.json"


class ScoredBatches:
    """
    The scored batches of one data set in a folder.

    Args:
        folder: made if it is not there.
        settings: all that scores depend on; batches that were scored under others are not mixed with these.

    Raises:
        MoECLIPError: if the folder holds batches that were scored under other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        recorded = folder / _SETTINGS_FILE
        if recorded.exists():
            _refuse_other_settings(json.loads(recorded.read_text()), settings, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(recorded, json.dumps(settings, indent=2).encode())

    def numbers(self) -> set[int]:
        """Numbers of the batches that are there."""
        return {int(path.stem) for path in self.folder.glob("*.npz")}

    def save(self, number: int, batch: ScoredBatch) -> None:
        """Write a batch; a crash leaves it whole or not at all."""
        partial = self.folder / "partial"
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **batch.arrays())
        os.replace(partial, self._path(number))

    def load(self, number: int) -> ScoredBatch:
        """
        Read a batch back.

        Raises:
            MoECLIPError: if the file is damaged.
        """
        path = self._path(number)
        try:
            with np.load(path) as arrays:
                return ScoredBatch(**arrays)
        except (OSError, ValueError, TypeError, BadZipFile) as error:
            raise MoECLIPError(f"{path}: is damaged: delete it, and its batch is scored again") from error

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"


def _refuse_other_settings(recorded: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    other = [name for name in settings if recorded.get(name) != settings[name]]
    if other:
        difference = ", ".join(f"{name} {recorded.get(name)}, not {settings[name]}" for name in other)
        raise MoECLIPError(
            f"{folder}: holds an unfinished evaluation of other settings ({difference}): go on with those, write "
            f"elsewhere, or delete that folder"
        )


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
