"""Loading a checkpoint or an adapter for use: the embedded one, a folder or a Hub repository."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from huggingface_hub import snapshot_download
from transformers.utils import logging

from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.hub_errors import describe_hub_error
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor, patch_maps

if TYPE_CHECKING:
    from os import PathLike

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

# What is downloaded: data, and no code.
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt"]

EMBEDDED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "moeclip-tiny-textures"


class Detector(Protocol):
    """What scoring images takes, whatever computes it: torch ([`Pretrained`]) or an exported graph."""

    @property
    def processor(self) -> MoECLIPProcessor:
        """Prepares images, and reads maps and scores."""

    def encode_class(self, class_name: str) -> torch.Tensor:
        """
        What [`~Detector.patch_maps`] has to know of a class, made once for all its images.

        Raises:
            MoECLIPError: for a name that cannot be used.
        """

    def patch_maps(self, pixel_values: torch.Tensor, encoded_class: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepared images (B, 3, H, W) of one class give smoothed maps (B, h, w) and scores (B,), both 0 to 1."""


class Pretrained(NamedTuple):
    """A model in eval mode, and its processor: a [`Detector`] that torch computes."""

    model: MoECLIPModel
    processor: MoECLIPProcessor

    def encode_class(self, class_name: str) -> torch.Tensor:
        """Anchors of one class, (1, 2, D)."""
        try:
            prompts = self.processor(text=[class_name], return_tensors="pt").to(self.model.device)
        except ValueError as error:
            raise MoECLIPError(f"class name {class_name[:60]!r}: {error}") from error
        with torch.inference_mode():
            return self.model.get_text_embeds(**prompts)

    def patch_maps(self, pixel_values: torch.Tensor, encoded_class: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smoothed maps (B, h, w) and scores (B,) of prepared images (B, 3, H, W), against anchors (1, 2, D)."""
        with torch.inference_mode():
            outputs = self.model(pixel_values.to(self.model.device, self.model.dtype), text_embeds=encoded_class)
            return patch_maps(outputs, self.processor.domain)


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
    Load a trained MoECLIP checkpoint, or an adapter over the CLIP that it names, with its processor. No code of the
    checkpoint is run, nor downloaded.

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
    folder = fetch_checkpoint(source, revision)
    # What was fetched is a commit's snapshot: from here on nothing is asked of the Hub.
    pinned = {} if Path(source).is_dir() else {"revision": folder.name, "local_files_only": True}
    try:
        if is_adapter(folder):
            loaded = _load_adapter(source, folder, dtype)
        else:
            with quiet_transformers():  # what is missing is said below
                loaded, report = MoECLIPModel.from_pretrained(
                    source, dtype=dtype, use_safetensors=True, output_loading_info=True, **pinned
                )
            _refuse_missing_weights(source, report)
        loaded.config._commit_hash = pinned.get("revision")
        processor = MoECLIPProcessor.from_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a foreign or damaged checkpoint leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{source}: cannot be loaded as a MoECLIP checkpoint: {reason}") from error
    return Pretrained(loaded.eval().to(device), processor)


def fetch_checkpoint(source: "str | PathLike[str]", revision: str | None = None) -> Path:
    """
    Find a checkpoint's or an adapter's folder, downloading it to the cache if it is a Hub repository.

    Args:
        source (`str` or path): a folder or a Hub id.
        revision (`str`, *optional*): of a Hub repository; a branch, a tag or a commit.

    Returns:
        The folder itself, or the snapshot in the cache, whose name is the commit's. Code is not downloaded.

    Raises:
        CheckpointError: if it is not there, cannot be had, or has not the files of a checkpoint.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    str(source), revision=revision, allow_patterns=_CHECKPOINT_FILES, ignore_patterns="*/*"
                )
            )
        except Exception as error:  # of the Hub, of the network, of the disk
            reason = describe_hub_error(error, str(source), revision)
            raise CheckpointError(reason or f"{source}: cannot be downloaded: {error}") from error
    # Where a repository has none of the files, there is not even a folder.
    _refuse_incomplete(str(source), {file.name for file in folder.iterdir()} if folder.is_dir() else set())
    return folder


def is_hub_id(name: str) -> bool:
    """Whether this is a Hub id (USER/NAME) rather than a folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return (folder / ADAPTER_CONFIG).exists() and not (folder / CONFIG).exists()


def _refuse_incomplete(source: str, names: set[str]) -> None:
    """Refuse a folder that lacks one of the files that every checkpoint has."""
    if CONFIG not in names and ADAPTER_CONFIG not in names:
        wanted = f"{CONFIG} or {ADAPTER_CONFIG}"
    elif CONFIG in names and not any(name.endswith(".safetensors") for name in names):
        wanted = "model.safetensors"
    elif CONFIG not in names and "adapter_model.safetensors" not in names:
        wanted = "adapter_model.safetensors"
    elif not names & {"processor_config.json", "preprocessor_config.json"}:
        wanted = "processor_config.json"
    else:
        return
    raise CheckpointError(f"{source}: is no complete checkpoint: it has no {wanted}, which may have been moved.")


def _load_adapter(source: str, folder: Path, dtype: torch.dtype) -> MoECLIPModel:
    """An adapter joined with its base, which needs no PEFT."""
    from moeclip_hf.adapters import adapter_to_full, load_adapter

    try:
        full = adapter_to_full(load_adapter(folder, dtype=dtype))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), source)) from error
    full.name_or_path = full.config.name_or_path = source
    return full.to(dtype)


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
