"""Forward pass of MoECLIP beside the vision tower that it cannot do without.

    python -m benchmarks.forward [--images 1 4] [--image-size 518] [--rounds 5]

Both sides have ViT-L/14's sizes, random weights (speed does not depend on them), float32 and SDPA attention, and run
in turn. MoECLIP's side computes everything that scores and maps are made of, anchors apart, which are computed once a
class.
"""

from typing import Any

import torch
from transformers import CLIPVisionModel

from benchmarks.alternating import alternate, ratio
from benchmarks.report import Goal, Report, argument_parser, publish, timing_rows
from moeclip_hf import MoECLIPConfig, MoECLIPModel

TOWER, MOECLIP = "transformers CLIP vision tower", "MoECLIP"


def random_model(**config: Any) -> MoECLIPModel:
    """MoECLIP of the paper's sizes where the configuration says nothing else, every expert alive."""
    torch.manual_seed(0)
    model = MoECLIPModel(MoECLIPConfig(**config))
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.02)
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    return model.eval()


def bare_tower(model: MoECLIPModel) -> CLIPVisionModel:
    """transformers' own vision tower with the same weights."""
    tower = CLIPVisionModel(model.config.vision_config)
    tower.load_state_dict(model.vision_model.state_dict())
    return tower.eval()


def measure(model: MoECLIPModel, tower: CLIPVisionModel, images: int, image_size: int, rounds: int) -> Report:
    """Both sides on a batch of random images."""
    pixel_values = torch.randn(images, 3, image_size, image_size)
    anchors = torch.nn.functional.normalize(torch.randn(1, 2, model.config.projection_dim), dim=-1)
    sides = {
        TOWER: lambda: tower(pixel_values, interpolate_pos_encoding=True),
        MOECLIP: lambda: model(pixel_values, text_embeds=anchors),
    }
    with torch.inference_mode():
        seconds = alternate(sides, rounds)
    title = f"Forward, {images} x {image_size} px, float32"
    return Report(title, timing_rows(seconds, TOWER), [Goal(title, ratio(seconds, MOECLIP, TOWER), 1.03)])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1])
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    model = random_model()
    tower = bare_tower(model)
    publish([measure(model, tower, images, args.image_size, args.rounds) for images in args.images], args.output)


if __name__ == "__main__":
    main()
