"""Synthetic textures and defects with exact masks, to train, test and try things on without any download."""

from moeclip_hf.data.textures.benchmark import FAMILIES, render, write_texture_benchmark
from moeclip_hf.data.textures.defects import DEFECTS, TOLERANCE, add_defect

__all__ = ["DEFECTS", "FAMILIES", "TOLERANCE", "add_defect", "render", "write_texture_benchmark"]
