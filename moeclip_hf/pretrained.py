"""Loading a checkpoint for use: the embedded one, a folder or a Hub repository."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.utils import logging

from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor

if TYPE_CHECKING:
    from os import PathLike

EMBEDDED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "moeclip-tiny-textures"


class Pretrained(NamedTuple):
    """A model in eval mode, and its processor."""

    model: MoECLIPModel
    processor: MoECLIPProcessor


def best_device() -> torch.device:
    """The accelerator, if there is one, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """float16 on CUDA, where it is as exact as maps need and several times as fast; float32 elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.float32


def load_pretrained(
    model: "str | PathLike[str] | None" = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> Pretrained:
    """
    Load a trained MoECLIP checkpoint with its processor. No code of the checkpoint is run.

    Args:
        model (`str` or path, *optional*): a folder or a Hub id; the embedded checkpoint by default.
        device, dtype (*optional*): chosen by [`best_device`] and [`best_dtype`] by default.
        revision (`str`, *optional*): of a Hub repository.

    Raises:
        CheckpointError: if it is not there, is no MoECLIP checkpoint, or lacks weights.
    """
    source = str(model or EMBEDDED_CHECKPOINT)
    if Path(source).exists() and not Path(source).is_dir():
        raise CheckpointError(f"{source}: is a file: name the checkpoint's folder, or a Hub id.")
    device = _usable_device(device) if device is not None else best_device()
    dtype = best_dtype(device) if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        with quiet_transformers():  # what is missing is said below
            loaded, report = MoECLIPModel.from_pretrained(
                source, dtype=dtype, revision=revision or "main", use_safetensors=True, output_loading_info=True
            )
        _refuse_missing_weights(source, report)
        processor = MoECLIPProcessor.from_pretrained(source, revision=revision or "main")
    except CheckpointError:
        raise
    except Exception as error:  # whatever a missing, foreign or damaged checkpoint leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{source}: cannot be loaded as a MoECLIP checkpoint: {reason}") from error
    return Pretrained(loaded.eval().to(device), processor)


def _refuse_missing_weights(source: str, report: dict[str, Any]) -> None:
    lacking = sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]})
    if lacking:
        raise CheckpointError(
            f"{source}: lacks {len(lacking)} of MoECLIP's weights ({lacking[0]}, ...): a plain CLIP has to be "
            "trained, or joined with an adapter by `moeclip convert`, before it can score images."
        )


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        usable = torch.device(device)
        torch.empty(1, device=usable)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise MoECLIPError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return usable


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing anything below an error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
