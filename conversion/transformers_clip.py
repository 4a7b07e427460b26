"""A CLIP of transformers: a folder or Hub repository with its configuration, or bare weights of the same names."""

from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessorPil, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from moeclip_hf.conversion.assembly import (
    Settings,
    build_model,
    check_setting_names,
    clip_from_tensors,
    clip_settings,
    copy_to_float32,
    make_config,
    merge_settings,
)
from moeclip_hf.conversion.key_table import KeyTable, Row, Tensors, check_tensors, refuse
from moeclip_hf.conversion.openai_clip import is_openai_clip, openai_clip_from_tensors
from moeclip_hf.conversion.reading import describe, is_repository, one_line, read_tensors
from moeclip_hf.errors import ConversionError
from moeclip_hf.pretrained import PROCESSOR_FILES, fetch_clip, statistics_fault
from moeclip_hf.stored_weights import expected_tensors, read_headers, weight_faults

CLIPSource: TypeAlias = str | Path | Tensors | CLIPModel

# Our names are transformers' own; checkpoints of old versions also hold the positions' indices.
TRANSFORMERS_TABLE = KeyTable(
    Row("{key}", "{key}"),
    ignored=(r"(text|vision)_model\.embeddings\.position_ids",),
)


def load_clip(clip: CLIPSource, **config: Any) -> CLIPModel:
    """
    Load a CLIP of any known format.

    Args:
        clip: a transformers folder or Hub id, a file of weights under OpenAI's or transformers' names (see
            [`convert_openai_clip`]), its tensors, or a [`~transformers.CLIPModel`].
        config: fields of [`~transformers.CLIPConfig`], nested ones too, over those of the CLIP.

    Returns:
        A new [`~transformers.CLIPModel`] in float32 and eval mode.

    Raises:
        ConversionError: if nothing is there or it does not fit; lists the entries that do not.
    """
    check_setting_names(config, CLIPConfig)
    source = describe(clip, "The CLIP")
    if isinstance(clip, CLIPModel):
        return _rebuild(clip.config, copy_to_float32(clip.state_dict()), source, config)
    if isinstance(clip, (str, Path)) and is_repository(clip):
        loaded = _load_repository(source)
        return _rebuild(loaded.config, loaded.state_dict(), source, config)
    tensors = read_tensors(clip, source)
    if not any(name.startswith(("visual.", "vision_model.")) for name in tensors):
        raise ConversionError(
            f"{source} is no CLIP: it has neither OpenAI's visual.* nor transformers' vision_model.* among its "
            f"{len(tensors)} entries."
        )
    if is_openai_clip(tensors):
        return openai_clip_from_tensors(tensors, source, config)
    return clip_from_tensors(tensors, TRANSFORMERS_TABLE, source, config)


def _load_repository(name: str) -> CLIPModel:
    """Load a folder or Hub repository; what its weights lack or hold too much is an error, not a warning."""
    try:
        folder = fetch_clip(name)
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if loaded.model_type != "clip":
            raise ConversionError(f"it is a {loaded.model_type} model, not a clip one.")
        # Anew, without what else the file may have set, such as kernels to fetch and run.
        config = make_config(CLIPConfig, clip_settings(loaded))
        refuse("it", weight_faults(read_headers(folder), CLIPModel, config))
        return CLIPModel.from_pretrained(folder, config=config, dtype=torch.float32)
    except Exception as error:  # whatever a missing, foreign, damaged or unsafe checkpoint leads to
        reason = one_line(error).removeprefix(f"{name}: ")
        raise ConversionError(f"{name}: cannot be loaded as a CLIP: {reason}") from error


def image_statistics(clip: str | Path) -> dict[str, list[float]]:
    """
    Read how a CLIP's images are normalised: `image_mean` and `image_std`, a number a channel.

    Args:
        clip: what [`load_clip`] takes by name.

    Returns:
        Nothing of a file of weights, nor of a repository without a processor.

    Raises:
        ConversionError: the processor's file is damaged, or no image can be normalised with what it says.
    """
    folder = fetch_clip(clip) if is_repository(clip) else None
    if folder is None or not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return {}
    try:
        settings, _ = CLIPImageProcessorPil.get_image_processor_dict(folder)
        if not isinstance(settings, dict):
            raise ConversionError("it holds no settings.")
    except Exception as error:  # whatever a damaged file leads to
        raise ConversionError(f"{clip}: its processor cannot be read: {one_line(error)}") from error
    statistics: dict[str, list[float]] = {
        name: settings[name] for name in ("image_mean", "image_std") if name in settings
    }
    mean, std = statistics.get("image_mean", OPENAI_CLIP_MEAN), statistics.get("image_std", OPENAI_CLIP_STD)
    if fault := statistics_fault(mean, std):
        raise ConversionError(f"{clip}: its processor cannot be used: {fault}.")
    return statistics


def _rebuild(clip: CLIPConfig, tensors: Tensors, source: str, settings: Settings) -> CLIPModel:
    """Make a CLIP of another's weights, with settings laid over its own."""
    config = make_config(CLIPConfig, merge_settings(clip_settings(clip), settings))
    check_tensors(tensors, expected_tensors(CLIPModel, config), source)
    return build_model(CLIPModel, config, tensors)
