"""Loading a checkpoint or an adapter for use: the embedded one, a folder or a Hub repository."""

import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from huggingface_hub import snapshot_download
from transformers.utils import logging

from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.hub_errors import describe_hub_error
from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
from moeclip_hf.modeling.image_processing_moeclip import MoECLIPImageProcessor
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor, patch_maps
from moeclip_hf.stored_weights import (
    ADAPTER_WEIGHTS,
    SAFETENSORS,
    WEIGHT_DTYPES,
    check_weights,
    read_headers,
    read_tensors,
    refuse_non_finite,
)

if TYPE_CHECKING:
    from os import PathLike

    from transformers import CLIPTextConfig, PreTrainedTokenizerBase

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

# What is downloaded: data, and no code.
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt"]
_CLIP_FILES = ["*.json", "model*.safetensors", "*.txt"]
# Of a CLIP that was published before there were safetensors, as OpenAI's ViT-L/14 of 336 pixels; read as data too.
_PICKLED_CLIP_FILES = ["pytorch_model*.bin"]
# What a checkpoint's folder or repository holds beside its code, which is never needed here.
PUBLISHED_FILES = (*_CHECKPOINT_FILES, "*.md", "*.png", "LICENSE*")
# What of a folder is read, or published.
_READ_FILES = (*PUBLISHED_FILES, "*.bin")

# Pixels; a larger image is cut into tiles. A processor that asks for more asks for gigabytes.
_MAX_EDGE = 8192
# The code that transformers' CLIP knows as "the largest id", from before its configurations named the right one.
_LEGACY_END_ID = 2

# Of a configuration: what training alone looks at, and what of a tower no weight's shape tells.
_OF_TRAINING = ("lora_dropout", "etf_loss_coef", "router_aux_loss_coef")
_OF_TOWERS = {
    "text_config": ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id"),
    "vision_config": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
}

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
    """A model, put in eval mode by use, and its processor: a [`Detector`] that torch computes."""

    model: MoECLIPModel
    processor: MoECLIPProcessor

    def encode_class(self, class_name: str) -> torch.Tensor:
        """Anchors of one class, (1, 2, D)."""
        self.model.eval()  # a trainer leaves it in training mode
        try:
            prompts = self.processor(text=[class_name], return_tensors="pt").to(self.model.device)
        except ValueError as error:
            raise MoECLIPError(f"class name {class_name[:60]!r}: {error}") from error
        with torch.inference_mode():
            return self.model.get_text_embeds(**prompts)

    def patch_maps(self, pixel_values: torch.Tensor, encoded_class: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smoothed maps (B, h, w) and scores (B,) of prepared images (B, 3, H, W), against anchors (1, 2, D)."""
        if self.model.training:  # as a trainer leaves it
            self.model.eval()
        with torch.inference_mode():
            outputs = self.model(pixel_values.to(self.model.device, self.model.dtype), text_embeds=encoded_class)
            return patch_maps(outputs, self.processor.domain)


def best_device() -> torch.device:
    """The accelerator, if there is one, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """float16 on CUDA, for speed; float32 elsewhere. What float16 does to figures was not measured."""
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
        MoECLIPError: if the device cannot be used, or a model cannot compute in the type.
        CheckpointError: if it is not there, is no MoECLIP checkpoint, its weights are not just those that its
            configuration asks for, or its processor is another model's.
    """
    source = str(model or EMBEDDED_CHECKPOINT)
    if Path(source).exists() and not Path(source).is_dir():
        raise CheckpointError(f"{source}: is a file: name the checkpoint's folder, or a Hub id.")
    device = _usable_device(device) if device is not None else best_device()
    dtype = best_dtype(device) if dtype is None else _usable_dtype(dtype)
    folder = fetch_checkpoint(source, revision)
    # What was fetched is a commit's snapshot: from here on nothing is asked of the Hub.
    pinned = {} if Path(source).is_dir() else {"revision": folder.name, "local_files_only": True}
    with _told_of(source, folder):
        if is_adapter(folder):
            loaded = _load_adapter(source, folder, dtype)
        else:
            loaded = _load_full(source, folder, dtype, **pinned)
        loaded.config._commit_hash = pinned.get("revision")
        processor = _load_processor(source, folder, loaded.config)
    return Pretrained(loaded.eval().to(device), processor)


def check_checkpoint(folder: Path) -> None:
    """
    Refuse what would not load, as far as its settings and weights tell: of an adapter without its base.

    Args:
        folder: from [`fetch_checkpoint`].

    Raises:
        CheckpointError: as [`load_pretrained`] does.
    """
    source = str(folder)
    with _told_of(source, folder):
        if is_adapter(folder):
            from moeclip_hf.adapters import read_adapter

            read_adapter(source, folder)
            _load_processor(source, folder)
            refuse_non_finite(source, read_tensors(folder, [ADAPTER_WEIGHTS]))
        else:
            _load_processor(source, folder, _check_full(source, folder))
            refuse_non_finite(source, read_tensors(folder))


@contextmanager
def _told_of(source: str, folder: Path) -> Iterator[None]:
    """Have errors name a checkpoint as the user does, in one line."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), source)) from error
    except Exception as error:  # whatever a foreign or damaged checkpoint leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{source}: cannot be loaded as a MoECLIP checkpoint: {reason}") from error


def describe_computation(model: MoECLIPModel, processor: MoECLIPProcessor) -> dict[str, Any]:
    """
    What maps and scores depend on beside weights, class names and the images' size, by setting: the parts' and the
    towers' settings that no weight tells, and how images are normalised. As JSON gives it back.
    """
    config, images = model.config, processor.image_processor
    parts = {name: getattr(config, name) for name in MoECLIPConfig.__annotations__ if name not in _OF_TRAINING}
    towers = {
        f"{tower}.{name}": getattr(getattr(config, tower), name)
        for tower, names in _OF_TOWERS.items()
        for name in names
    }
    return parts | towers | {"image_mean": list(images.image_mean), "image_std": list(images.image_std)}


def fetch_checkpoint(source: "str | PathLike[str]", revision: str | None = None) -> Path:
    """
    Find a checkpoint's or an adapter's folder, downloading it to the cache if it is a Hub repository.

    Args:
        source (`str` or path): a folder or a Hub id.
        revision (`str`, *optional*): of a Hub repository; a branch, a tag or a commit.

    Returns:
        The folder itself, or the snapshot in the cache, whose name is the commit's. Code is not downloaded.

    Raises:
        CheckpointError: if it is not there, cannot be had, has not the files of a checkpoint, or is both a model and
            an adapter.
    """
    folder = _fetch(source, _CHECKPOINT_FILES, revision)
    # Where a repository has none of the files, there is not even a folder.
    _refuse_incomplete(str(source), {file.name for file in folder.iterdir()} if folder.is_dir() else set())
    return folder


def fetch_adapter(source: "str | PathLike[str]", revision: str | None = None) -> Path:
    """
    Find an adapter's folder, which need not hold a processor, as [`fetch_checkpoint`] does.

    Raises:
        CheckpointError: if it is not there, cannot be had, or is both a model and an adapter.
    """
    return _fetch(source, _CHECKPOINT_FILES, revision)


def fetch_clip(source: "str | PathLike[str]", revision: str | None = None) -> Path:
    """
    Find the folder of a model, a plain CLIP's too, as [`fetch_checkpoint`] does, whatever form its weights have.

    Raises:
        CheckpointError: if it is not there, cannot be had, or is both a model and an adapter.
    """
    folder = _fetch(source, _CLIP_FILES, revision)
    if not Path(source).is_dir() and not any(folder.glob("*.safetensors")):
        folder = _fetch(source, _CLIP_FILES + _PICKLED_CLIP_FILES, revision)
    return folder


def _fetch(source: "str | PathLike[str]", files: Sequence[str], revision: str | None) -> Path:
    """A folder whose files are its own, or a snapshot with what of a Hub repository fits the patterns."""
    folder = Path(source)
    if folder.is_dir():
        refuse_links(folder)
    else:
        folder = _download(str(source), files, revision)
    # transformers would put the adapter, of whatever kind and size, into the model, and nobody has looked at it.
    if (folder / CONFIG).exists() and (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{source}: holds both {CONFIG}, of a model, and {ADAPTER_CONFIG}, of an adapter: put the adapter's files "
            "into a folder of their own."
        )
    return folder


def _download(source: str, files: Sequence[str], revision: str | None) -> Path:
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files), ignore_patterns="*/*"))
    except Exception as error:  # of the Hub, of the network, of the disk
        reason = describe_hub_error(error, source, revision)
        if reason is None:
            reason = f"{source}: cannot be downloaded: {' '.join(str(error).split()) or type(error).__name__}"
        raise CheckpointError(reason) from error


def refuse_links(folder: Path) -> None:
    """
    Refuse links that lead out of a model's folder, and pipes and devices, which cannot be read to an end.

    Raises:
        CheckpointError: naming the file.
    """
    for file in folder.iterdir():
        if file.is_dir() or not any(fnmatch.fnmatch(file.name, pattern) for pattern in _READ_FILES):
            continue
        if leads_out(file, folder):
            raise CheckpointError(f"{file}: links to {file.resolve()}, out of its folder: put the file itself there.")
        if not file.is_file():
            raise CheckpointError(f"{file}: is no file that can be read: put the file itself there.")


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a file of a model's folder is a link to what is not the model's own."""
    root = folder.resolve()
    repository = root.parent.parent
    own = [root]
    # Snapshots of the Hub's cache are links to blobs beside them, and those to blobs that repositories share.
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        own += [repository / "blobs", repository.parent / "blobs"]
    return not any(file.resolve().is_relative_to(place) for place in own)


def is_hub_id(name: str) -> bool:
    """Whether this is a Hub id (USER/NAME) rather than a folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return (folder / ADAPTER_CONFIG).exists() and not (folder / CONFIG).exists()


def _refuse_incomplete(source: str, names: set[str]) -> None:
    """Refuse a folder that lacks one of the files that every checkpoint has."""
    if "model.onnx" in names and not {CONFIG, ADAPTER_CONFIG} & names:
        raise CheckpointError(
            f"{source}: is an exported graph, which only scores: name the checkpoint it was made of."
        )
    if CONFIG not in names and ADAPTER_CONFIG not in names:
        wanted = f"{CONFIG} or {ADAPTER_CONFIG}"
    elif CONFIG in names and not any(name.endswith(".safetensors") for name in names):
        wanted = "model.safetensors"
    elif CONFIG not in names and "adapter_model.safetensors" not in names:
        wanted = "adapter_model.safetensors"
    elif not names.intersection(PROCESSOR_FILES):
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


def _load_full(source: str, folder: Path, dtype: torch.dtype, **pinned: Any) -> MoECLIPModel:
    """A whole model, whose weights are just those that its configuration asks for, all of them finite."""
    _check_full(source, folder)
    with quiet_transformers():
        model = MoECLIPModel.from_pretrained(source, dtype=dtype, use_safetensors=True, **pinned)
    refuse_non_finite(source, model.state_dict().items())
    return model


def _check_full(source: str, folder: Path) -> MoECLIPConfig:
    """The configuration of a whole model, once the headers of its weights are just as that asks for."""
    config = MoECLIPConfig.from_pretrained(folder)
    lacking = check_weights(source, read_headers(folder, SAFETENSORS), MoECLIPModel, config)
    if lacking:
        raise CheckpointError(
            f"{source}: lacks {len(lacking)} of MoECLIP's weights ({lacking[0]}, ...): a plain CLIP has to be "
            "trained, or joined with an adapter by `moeclip convert`, before it can score images."
        )
    return config


def _load_processor(source: str, folder: Path, config: MoECLIPConfig | None = None) -> MoECLIPProcessor:
    """A processor that can be used and, where the configuration is told, is this model's."""
    processor = MoECLIPProcessor.from_pretrained(folder, trust_remote_code=False)
    check_processor(source, processor)
    if config is not None:
        _refuse_other_processor(source, processor, config)
    return processor


def check_processor(source: str, processor: MoECLIPProcessor) -> None:
    """
    Refuse a processor with whose settings no image could be scored, or every one wrongly.

    Args:
        source (`str`): names the checkpoint in errors.
        processor ([`MoECLIPProcessor`])

    Raises:
        CheckpointError: naming the setting and its value.
    """
    images = processor.image_processor
    if not isinstance(images, MoECLIPImageProcessor):
        raise CheckpointError(f"{source}: its image processor is a {type(images).__name__}, another model's.")
    edges = max(images.size.values())
    faults = {
        f"image_threshold ({processor.image_threshold!r}) is not 0 to 1": _is_score(processor.image_threshold),
        f"pixel_threshold ({processor.pixel_threshold!r}) is not 0 to 1": _is_score(processor.pixel_threshold),
        f"patch_size ({images.patch_size!r}) is no number of pixels": _is_size(images.patch_size),
        f"size ({images.size}) is over {_MAX_EDGE} pixels": edges <= _MAX_EDGE,
    }
    unsound = [fault for fault, is_sound in faults.items() if not is_sound]
    if fault := next(iter(unsound), None) or statistics_fault(images.image_mean, images.image_std):
        raise CheckpointError(f"{source}: its processor cannot be used: {fault}.")


def statistics_fault(image_mean: Any, image_std: Any) -> str | None:
    """Say why images cannot be normalised with these, where they cannot."""
    if not _is_per_channel(image_mean):
        return f"image_mean ({image_mean}) is not three finite numbers"
    if not _is_per_channel(image_std) or min(image_std) <= 0:
        return f"image_std ({image_std}) is not three positive numbers"
    return None


def _is_score(value: Any) -> bool:
    # A calibrated threshold may be the number next to 1, which no score reaches.
    return isinstance(value, (int, float)) and 0 <= value <= 1 + 1e-6


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _is_per_channel(values: Any) -> bool:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return False
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _refuse_other_processor(source: str, processor: MoECLIPProcessor, config: MoECLIPConfig) -> None:
    """Refuse a processor that was made for another model."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    patch_size = processor.image_processor.patch_size
    if (patch_size, 3) != (vision.patch_size, vision.num_channels):
        raise CheckpointError(
            f"{source}: its processor is another model's: it makes patches of {patch_size} pixels and 3 channels, "
            f"and the model takes {vision.patch_size} and {vision.num_channels}."
        )
    if difference := tokenizer_difference(processor.tokenizer, text):
        raise CheckpointError(f"{source}: its tokenizer is another model's: {difference}.")
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, text.max_position_embeddings)


def tokenizer_difference(tokenizer: "PreTrainedTokenizerBase", text_config: "CLIPTextConfig") -> str | None:
    """Say in what a tokenizer is not the one of a text tower, if it is not."""
    end = text_config.eos_token_id
    end = text_config.vocab_size - 1 if end == _LEGACY_END_ID else end
    if len(tokenizer) <= text_config.vocab_size and tokenizer.eos_token_id == end:
        return None
    return (
        f"it has {len(tokenizer)} tokens and ends texts with {tokenizer.eos_token_id}, where the text tower has "
        f"{text_config.vocab_size} and expects {end}"
    )


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        usable = torch.device(device)
        torch.zeros((), device=usable).item()  # a "meta" tensor has no value
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise MoECLIPError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return usable


def _usable_dtype(dtype: str | torch.dtype) -> torch.dtype:
    usable: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if usable not in WEIGHT_DTYPES.values():
        names = ", ".join(str(one).removeprefix("torch.") for one in WEIGHT_DTYPES.values())
        raise MoECLIPError(f"dtype ({dtype!r}) must be one of {names}.")
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
