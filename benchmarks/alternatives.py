"""Forms of a forward pass and of its parts that were tried, beside those that stand.

    python -m benchmarks.alternatives [--image-size 518] [--rounds 5]

ViT-L/14's sizes, random weights, one image; the forms of one thing run in turn in one process. How far patches'
probabilities are from those of the form that stands is told beside the time of a whole forward pass. What would be
lost in its noise is timed alone, and told as a share of it. `torch.compile` takes a C++ compiler, and its minutes of
compiling are not counted.
"""

import copy
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.alternating import alternate, ratio
from benchmarks.forward import random_model
from benchmarks.report import Report, argument_parser, publish
from moeclip_hf import MoECLIPModel
from moeclip_hf.modeling.modeling_moeclip import average_pool, unit_length
from moeclip_hf.modeling.moe_lora import MoELora

Form = Callable[[], object]

AS_IT_IS = "as it is: float32, inference_mode"
CALLS = 10  # of a part, to be timed together


def forms(model: MoECLIPModel, image_size: int) -> dict[str, Callable[[], torch.Tensor]]:
    """What computes the same probabilities of the patches, by name: (1, maps, h, w)."""
    pixel_values = torch.randn(1, 3, image_size, image_size)
    anchors = torch.nn.functional.normalize(torch.randn(1, 2, model.config.projection_dim), dim=-1)
    half = copy.deepcopy(model).bfloat16()
    compiled = torch.compile(copy.deepcopy(model))

    def inference(run: MoECLIPModel, pixels: torch.Tensor, text_embeds: torch.Tensor = anchors) -> torch.Tensor:
        with torch.inference_mode():
            return run(pixels, text_embeds=text_embeds).anomaly_logits.sigmoid()

    def no_grad() -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values, text_embeds=anchors).anomaly_logits.sigmoid()

    return {
        AS_IT_IS: lambda: inference(model, pixel_values),
        "no_grad": no_grad,
        "torch.compile": lambda: inference(compiled, pixel_values),
        "bfloat16": lambda: inference(half, pixel_values.bfloat16(), anchors.bfloat16()),
    }


def measure_forward(model: MoECLIPModel, image_size: int, rounds: int) -> tuple[Report, float]:
    """All forms of a forward pass, and the seconds of the one that stands."""
    sides = forms(model, image_size)
    answers = {name: run().float() for name, run in sides.items()}
    seconds = alternate(sides, rounds)
    rows = [["form", "over the one that stands", "largest difference of a patch's probability"]]
    for name in sides:
        difference = (answers[name] - answers[AS_IT_IS]).abs().max().item()
        rows.append([name, f"{ratio(seconds, name, AS_IT_IS):.3f}", f"{difference:.1e}"])
    return Report(f"Forms of a forward pass, 1 x {image_size} px", rows), median(seconds[AS_IT_IS])


def parts(model: MoECLIPModel, image_size: int) -> dict[str, tuple[int, Form, Form]]:
    """Parts of a forward pass, by what is done: how often one has it, what stands and what it could be instead."""
    tower, projection = model.vision_model, model.patch_projection
    embeddings, width = tower.embeddings, model.config.vision_config.hidden_size
    side = image_size // model.config.vision_config.patch_size
    pixel_values, patches = torch.randn(1, 3, image_size, image_size), torch.randn(1, side, side, width)
    tokens, layer = torch.randn(1, side**2 + 1, width), model.moe_layers[0]
    convolution = embeddings.patch_embedding
    wide_pixels = pixel_values.contiguous(memory_format=torch.channels_last)
    wide_convolution = copy.deepcopy(convolution).to(memory_format=torch.channels_last)

    def project_first() -> None:
        projection(patches, tower.post_layernorm(patches), tower.post_layernorm(torch.zeros(width)), 0)

    def pool_first() -> None:
        for size in projection.sizes:
            projected = projection.projections[0](tower.post_layernorm(average_pool(patches, size)))
            unit_length(projection.activation(projected))

    taps, layers = len(model.config.feature_layers), len(model.moe_layers)
    return {
        "embed a tap's patches: project and pool; pool and project each window size": (
            taps, project_first, pool_first
        ),
        "resample position embeddings: each time; once": (
            1, lambda: embeddings.interpolate_pos_encoding(pixel_values, image_size, image_size), lambda: None
        ),
        "embed pixels: channels first; channels last": (
            1, lambda: convolution(pixel_values), lambda: wide_convolution(wide_pixels)
        ),
        "experts outside training: without ETF and balance term; with both": (
            layers, lambda: layer(tokens), lambda: layer(tokens, output_losses=True)
        ),
    }  # fmt: skip


def measure_parts(model: MoECLIPModel, image_size: int, forward_seconds: float, rounds: int) -> Report:
    """Each part of a forward pass beside what it could be."""
    rows = [["part: what stands; what could be", "what stands, ms", "what could be, ms", "change of a forward pass"]]
    for name, (times, *both) in parts(model, image_size).items():
        stands, instead = alternate(dict(zip("ab", map(repeated, both), strict=True)), 5 * rounds).values()
        before, after = (1e3 * median(seconds) / CALLS for seconds in (stands, instead))
        change = times * (after - before) / 1e3 / forward_seconds
        rows.append([f"{name} ({times} a pass)", f"{before:.2f}", f"{after:.2f}", f"{change:+.2%}"])
    return Report(f"Parts of a forward pass of {forward_seconds:.2f} s, 1 x {image_size} px", rows)


def repeated(form: Form) -> Callable[[], None]:
    """Some calls of a form, so that what is timed lasts."""

    def calls_of_it() -> None:
        with torch.inference_mode():
            for _ in range(CALLS):
                form()

    return calls_of_it


def measure_experts(rounds: int) -> Report:
    """A mixture of experts on 1370 tokens, compiled and not."""
    torch.manual_seed(0)
    layer = MoELora(1024).eval()
    layer.reset_parameters()
    torch.nn.init.normal_(layer.router.weight, std=0.02)
    torch.nn.init.normal_(layer.lora_B, std=0.02)
    compiled = torch.compile(layer)
    hidden_states = torch.randn(1, 1370, 1024)

    sides = {AS_IT_IS: lambda: layer(hidden_states), "torch.compile": lambda: compiled(hidden_states)}
    seconds = alternate({name: repeated(form) for name, form in sides.items()}, 10 * rounds)
    rows = [["form", "over the one that stands"]]
    rows += [[name, f"{ratio(seconds, name, AS_IT_IS):.3f}"] for name in seconds]
    return Report("Forms of a mixture of experts, 1370 tokens of width 1024", rows)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    experts, model = measure_experts(args.rounds), random_model()
    forward, seconds = measure_forward(model, args.image_size, args.rounds)
    publish([forward, measure_parts(model, args.image_size, seconds, args.rounds), experts], args.output)


if __name__ == "__main__":
    main()
