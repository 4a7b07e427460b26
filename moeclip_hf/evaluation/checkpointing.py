"""What an interrupted evaluation leaves behind, so that it can go on: its settings, and a file a scored batch."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from moeclip_hf.errors import MoECLIPError
from moeclip_hf.evaluation.scoring import ScoredBatch
from moeclip_hf.writing import write_whole

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
        self.folder, self.settings = folder, settings
        recorded = folder / _SETTINGS_FILE
        if recorded.exists():
            _refuse_other_settings(recorded, settings, folder)
            return
        # Left of a folder that was being deleted: nobody knows which settings they were scored under.
        for number in self.numbers():
            self._path(number).unlink()

    def numbers(self) -> set[int]:
        """Numbers of the batches that are there."""
        return {int(path.stem) for path in self.folder.glob("[0-9]*.npz")}

    def save(self, number: int, batch: ScoredBatch) -> None:
        """
        Write a batch; a crash leaves it whole or not at all.

        Raises:
            MoECLIPError: if it cannot be written, as on a full disk, or another evaluation writes there.
        """
        # With the first batch: settings under which nothing was scored, as memory was short, would bind nobody. Again,
        # as another evaluation may have begun to write there.
        recorded = self.folder / _SETTINGS_FILE
        if recorded.exists():
            _refuse_other_settings(recorded, self.settings, self.folder)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(recorded, json.dumps(self.settings).encode())
        content = io.BytesIO()
        arrays: dict[str, Any] = batch.arrays()
        np.savez_compressed(content, **arrays)
        write_whole(self._path(number), content.getvalue())

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
        except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
            raise MoECLIPError(f"{path}: is damaged: delete it, and its batch is scored again") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"


def _refuse_other_settings(recorded: Path, settings: dict[str, Any], folder: Path) -> None:
    try:
        found = dict(json.loads(recorded.read_text()))
    except (ValueError, TypeError) as error:
        raise MoECLIPError(f"{recorded}: is damaged: delete {folder}, and all is scored again") from error
    if difference := list_differences(found, settings):
        raise MoECLIPError(
            f"{folder}: holds an unfinished evaluation of other settings ({difference}): go on with those, write "
            f"elsewhere, or delete that folder"
        )


def list_differences(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Settings that were found to be others, with both values, in words; empty if there are none."""
    other = [name for name in settings if name in found and found[name] != settings[name]]
    told = [f"{name} {found[name]}, not {settings[name]}" for name in other]
    unknown = [name for name in settings if name not in found]
    if unknown:
        told.append(f"{len(unknown)} settings that an earlier version did not record, such as {unknown[0]}")
    return ", ".join(told)
