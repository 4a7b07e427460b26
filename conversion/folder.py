"""Writes converted models as checkpoint folders that `from_pretrained` reads."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerBase

from moeclip_hf.conversion.key_table import is_finite, refuse
from moeclip_hf.errors import ConversionError
from moeclip_hf.modeling.image_processing_moeclip import MoECLIPImageProcessor
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor


def save_moeclip(
    model: MoECLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """
    Write a complete MoECLIP checkpoint: configuration, weights and processor.

    Args:
        model ([`MoECLIPModel`]): cast to `dtype` in place.
        tokenizer: of the model's text tower.
        folder (`str` or `Path`): made if it is not there.
        image_size (`int`, *optional*): pixels that images are resized to; by default 518 for a CLIP of patch 14 and
            336 pixels, as the method does, and any other CLIP's own size.
        dtype (`torch.dtype`): of the stored weights.

    Raises:
        ConversionError: if a weight is too large for `dtype`.
    """
    vision: Any = model.config.vision_config
    if image_size is not None and image_size < vision.patch_size:
        raise ConversionError(f"image_size ({image_size}) is smaller than a patch of {vision.patch_size} pixels.")
    if image_size is None:
        image_processor = MoECLIPImageProcessor.for_clip(vision.image_size, vision.patch_size)
    else:
        size = {"height": image_size, "width": image_size}
        image_processor = MoECLIPImageProcessor(size=size, patch_size=vision.patch_size)
    _save_weights(model, folder, dtype)
    MoECLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)


def save_clip(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    **statistics: Any,
) -> None:
    """
    Write a complete CLIP checkpoint, with the processor that CLIP was trained with.

    Args:
        model, tokenizer, folder, dtype: as in [`save_moeclip`].
        statistics: `image_mean` and `image_std`, a number a channel, of a CLIP that was trained with others than
            OpenAI's; see [`image_statistics`].

    Raises:
        ConversionError: if a weight is too large for `dtype`.
    """
    vision: Any = model.config.vision_config
    edge = vision.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}, **statistics
    )
    _save_weights(model, folder, dtype)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)


def _save_weights(model: Any, folder: str | Path, dtype: torch.dtype) -> None:
    model.to(dtype=dtype)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = dtype
    overflown = [name for name, tensor in model.state_dict().items() if not is_finite(tensor)]
    refuse(str(dtype).removeprefix("torch."), {"weights too large": overflown})
    model.save_pretrained(folder)
