"""Checkpoints of other formats, in and out: the released adapters, OpenAI's CLIP, transformers' CLIP."""

from moeclip_hf.conversion.folder import save_clip, save_moeclip
from moeclip_hf.conversion.openai_clip import convert_openai_clip
from moeclip_hf.conversion.released import convert_released, export_released, settings_beside_adapter
from moeclip_hf.conversion.tokenizer import load_tokenizer
from moeclip_hf.conversion.transformers_clip import image_statistics, load_clip

__all__ = [
    "convert_openai_clip",
    "convert_released",
    "export_released",
    "image_statistics",
    "load_clip",
    "load_tokenizer",
    "save_clip",
    "save_moeclip",
    "settings_beside_adapter",
]
