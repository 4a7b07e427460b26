"""Which textures and defects the embedded checkpoint is made from, chosen by, and tested on.

Choices (settings, recipes, when to stop) look at `VALIDATION_FAMILIES` alone; figures that are reported come from
`TEST_FAMILIES` and `UNSEEN_DEFECTS`, which no adaptation and no choice has seen.
"""

from moeclip_hf.data.textures.benchmark import FAMILIES
from moeclip_hf.data.textures.defects import DEFECTS

VALIDATION_FAMILIES = (
    "circuit_board", "corduroy", "grass", "herringbone_parquet", "hexagonal_tiles", "knitted_fabric", "marble",
    "sand_ripples", "terrazzo", "wire_mesh",
)  # fmt: skip
"""Families that choices are made on; a model is never adapted on them."""

TEST_FAMILIES = (
    "asphalt", "burlap", "denim", "felt", "houndstooth", "plank_floor", "rattan", "sandstone", "straw", "tartan",
)  # fmt: skip
"""Families that are reported; a model is never adapted on them, and nothing is chosen by them."""

AUXILIARY_FAMILIES = tuple(name for name in FAMILIES if name not in VALIDATION_FAMILIES + TEST_FAMILIES)
"""Families with defects and masks to adapt on."""

UNSEEN_DEFECTS = ("abrasion", "debris")
"""Kinds of defect that are reported apart; nothing is trained on them."""

SEEN_DEFECTS = tuple(name for name in DEFECTS if name not in UNSEEN_DEFECTS)
"""Kinds of defect to train on."""
