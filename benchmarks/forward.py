"""Forward pass of MoECLIP beside the vision tower that it cannot do without.

    python -m benchmarks.forward [--images 1] [--image-size 518] [--rounds 5]

Both sides have ViT-L/14's sizes, random weights (speed does not depend on them), float32 and SDPA attention, and run
in turn. MoECLIP's side computes everything that scores and maps are made of, anchors apart, which are computed once a
class.
"""

import argparse
import platform
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionModel

from benchmarks.alternating import alternate, ratio
from moeclip_hf import MoECLIPConfig, MoECLIPModel


def random_model() -> MoECLIPModel:
    """MoECLIP of the paper's sizes, every expert alive."""
    torch.manual_seed(0)
    model = MoECLIPModel(MoECLIPConfig())
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.02)
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    return model.eval()


def bare_tower(model: MoECLIPModel) -> CLIPVisionModel:
    """transformers' own vision tower with the same weights."""
    tower = CLIPVisionModel(model.config.vision_config)
    tower.load_state_dict(model.vision_model.state_dict())
    return tower.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    model = random_model()
    tower = bare_tower(model)
    pixel_values = torch.randn(args.images, 3, args.image_size, args.image_size)
    anchors = torch.nn.functional.normalize(torch.randn(1, 2, model.config.projection_dim), dim=-1)
    sides = {
        "transformers CLIP vision tower": lambda: tower(pixel_values, interpolate_pos_encoding=True),
        "MoECLIP": lambda: model(pixel_values, text_embeds=anchors),
    }
    with torch.inference_mode():
        seconds = alternate(sides, args.rounds)

    table = Table(
        "side", "median s", "min s", "max s", "over the bare tower",
        title=f"Forward, {args.images} x {args.image_size} px, ViT-L/14, float32, {torch.get_num_threads()} threads",
        caption=f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}",
    )  # fmt: skip
    for name, values in seconds.items():
        relative = ratio(seconds, name, "transformers CLIP vision tower")
        table.add_row(name, *(f"{f(values):.2f}" for f in (median, min, max)), f"{relative:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
