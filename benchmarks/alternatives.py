"""Forms of the forward pass that were tried and not taken, beside the one that stands.

    python -m benchmarks.alternatives [--image-size 518] [--rounds 5]

ViT-L/14's sizes, random weights, one image; all forms run in turn in one process. How far patches' probabilities are
from those of the form that stands is told beside the time. `torch.compile` takes a C++ compiler, and its minutes of
compiling are not counted.
"""

import copy
from collections.abc import Callable

import torch

from benchmarks.alternating import alternate, ratio
from benchmarks.forward import random_model
from benchmarks.report import Report, argument_parser, publish
from moeclip_hf import MoECLIPModel
from moeclip_hf.modeling.moe_lora import MoELora

AS_IT_IS = "as it is: float32, inference_mode"


def cache_positions(model: MoECLIPModel, pixel_values: torch.Tensor) -> MoECLIPModel:
    """A copy that resamples its position embeddings once, for one size."""
    model = copy.deepcopy(model)
    embeddings = model.vision_model.embeddings
    positions = embeddings.interpolate_pos_encoding(embeddings.patch_embedding(pixel_values), *pixel_values.shape[-2:])
    embeddings.interpolate_pos_encoding = lambda *_: positions
    return model


def channels_last(model: MoECLIPModel) -> MoECLIPModel:
    """A copy whose patch embedding has its channels last, as its input then is."""
    model = copy.deepcopy(model)
    model.vision_model.embeddings.patch_embedding.to(memory_format=torch.channels_last)
    return model


def forms(model: MoECLIPModel, image_size: int) -> dict[str, Callable[[], torch.Tensor]]:
    """What computes the same probabilities of the patches, by name: (1, maps, h, w)."""
    pixel_values = torch.randn(1, 3, image_size, image_size)
    anchors = torch.nn.functional.normalize(torch.randn(1, 2, model.config.projection_dim), dim=-1)
    wide = pixel_values.contiguous(memory_format=torch.channels_last)
    half = copy.deepcopy(model).bfloat16()
    compiled = torch.compile(copy.deepcopy(model))

    def inference(run: MoECLIPModel, pixels: torch.Tensor, text_embeds: torch.Tensor = anchors) -> torch.Tensor:
        with torch.inference_mode():
            return run(pixels, text_embeds=text_embeds).anomaly_logits.sigmoid()

    def no_grad() -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values, text_embeds=anchors).anomaly_logits.sigmoid()

    cached = cache_positions(model, pixel_values)
    last = channels_last(model)
    return {
        AS_IT_IS: lambda: inference(model, pixel_values),
        "no_grad": no_grad,
        "position embeddings resampled once": lambda: inference(cached, pixel_values),
        "patch embedding with channels last": lambda: inference(last, wide),
        "torch.compile": lambda: inference(compiled, pixel_values),
        "bfloat16": lambda: inference(half, pixel_values.bfloat16(), anchors.bfloat16()),
    }


def measure_forward(image_size: int, rounds: int) -> Report:
    """All forms of a forward pass."""
    sides = forms(random_model(), image_size)
    answers = {name: run().float() for name, run in sides.items()}
    seconds = alternate(sides, rounds)
    rows = [["form", "over the one that stands", "largest difference of a patch's probability"]]
    for name in sides:
        difference = (answers[name] - answers[AS_IT_IS]).abs().max().item()
        rows.append([name, f"{ratio(seconds, name, AS_IT_IS):.3f}", f"{difference:.1e}"])
    return Report(f"Forms of a forward pass, 1 x {image_size} px", rows)


def measure_experts(rounds: int, calls: int = 10) -> Report:
    """A mixture of experts on 1370 tokens, compiled and not."""
    torch.manual_seed(0)
    layer = MoELora(1024).eval()
    layer.reset_parameters()
    torch.nn.init.normal_(layer.router.weight, std=0.02)
    torch.nn.init.normal_(layer.lora_B, std=0.02)
    compiled = torch.compile(layer)
    hidden_states = torch.randn(1, 1370, 1024)

    def run(form: Callable[..., object]) -> Callable[[], None]:
        def calls_of_it() -> None:
            with torch.inference_mode():
                for _ in range(calls):
                    form(hidden_states)

        return calls_of_it

    seconds = alternate({AS_IT_IS: run(layer), "torch.compile": run(compiled)}, 10 * rounds)
    rows = [["form", "over the one that stands"]]
    rows += [[name, f"{ratio(seconds, name, AS_IT_IS):.3f}"] for name in seconds]
    return Report("Forms of a mixture of experts, 1370 tokens of width 1024", rows)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    publish([measure_experts(args.rounds), measure_forward(args.image_size, args.rounds)], args.output)


if __name__ == "__main__":
    main()
