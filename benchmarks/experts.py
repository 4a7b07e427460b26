"""What the experts of a trained MoECLIP are worth, by the way in which they are trained.

    python -m benchmarks.experts --variants paper paper-literal --seeds 0 1 2 --output outputs/experts.jsonl

Trains the CLIP of the embedded checkpoint, its MoECLIP parts drawn anew, on the auxiliary families of textures, and
scores the validation families, which it never saw, as the benchmarks are scored: once as trained, and once with the
residual weight set to 0, which takes the experts out. A run that the output file already holds is not repeated. The
tables of docs/training.md are `--table` of that file.
"""

import argparse
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moeclip_hf import MoECLIPModel, MoECLIPProcessor
from moeclip_hf.data import load_folder, read_mask
from moeclip_hf.data.textures.benchmark import write_texture_benchmark
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES, SEEN_DEFECTS, VALIDATION_FAMILIES
from moeclip_hf.evaluation import evaluate
from moeclip_hf.metrics import AnomalyMetrics
from moeclip_hf.pretrained import Pretrained
from moeclip_hf.training import MoECLIPTrainer, Recipe, TrainingSamples, get_recipe, start_model, training_arguments

PICTURE_SIZE = 256
FIGURES = ("pixel_auroc", "pixel_ap", "image_auroc", "image_ap")

# Runs here are some 50 times shorter than the paper's 20 epochs, and learn 4 times as fast.
SPEEDUP = 4

# Every variant changes the literal recipe of the paper; `expert_speed` is the experts' learning rate over the others'.
VARIANTS: dict[str, dict[str, Any]] = {
    "literal": {},
    "no experts": {"residual_weight": 0.0},
    "B": {"expert_std": 0.02},
    "B, G": {"expert_std": 0.02, "router_std": 0.02},
    "B, G, expert lr x 3": {"expert_std": 0.02, "router_std": 0.02, "expert_speed": 3},
    "B, G, expert lr x 10": {"expert_std": 0.02, "router_std": 0.02, "expert_speed": 10},
    "literal, warm-up": {"warmup_steps": 50},
    "literal, eps 1": {"adam_epsilon": 1.0},
    "literal, clipped": {"max_grad_norm": 1.0},
    "B, G, clipped": {"expert_std": 0.02, "router_std": 0.02, "max_grad_norm": 1.0},
    "B, G, lambda 0.3": {"expert_std": 0.02, "router_std": 0.02, "residual_weight": 0.3},
    "B, G, expert lr x 10, lambda 0.3": {
        "expert_std": 0.02, "router_std": 0.02, "expert_speed": 10, "residual_weight": 0.3,
    },
}  # fmt: skip


def recipe_of(variant: str, steps: int, batch_size: int) -> Recipe:
    """The recipe of a variant, faster and with its milestone at two thirds of the run."""
    changes = dict(VARIANTS[variant]) if variant in VARIANTS else {}
    recipe = get_recipe("paper-literal" if variant in VARIANTS else variant)
    speed = changes.pop("expert_speed", recipe.expert_learning_rate / recipe.learning_rate)
    learning_rate = SPEEDUP * recipe.learning_rate
    return replace(
        recipe,
        **changes,
        batch_size=batch_size,
        learning_rate=learning_rate,
        expert_learning_rate=speed * learning_rate,
        halve_at=(2 * steps // 3,),
    )


def read_resized_mask(row: dict[str, Any], size: Sequence[int]) -> torch.Tensor:
    """(1, height, width), boolean, at the size that the model sees."""
    mask = torch.from_numpy(read_mask(row))[None, None]
    return torch.nn.functional.interpolate(mask.float(), size=tuple(size), mode="nearest-exact")[0] > 0


def mean_figures(metrics: Any) -> dict[str, float]:
    computed = [each.compute() for each in metrics]
    return {name: mean(figures[name] for figures in computed) for name in FIGURES}


@torch.no_grad()
def score_plain_clip(clip: MoECLIPModel, processor: MoECLIPProcessor, rows: Any) -> dict[str, float]:
    """
    CLIP without adaptation: patches behind the post-layernorm and the visual projection, by their cosines to the same
    sentences behind the text projection, a softmax of the two cosines times 100; the image score is the class token's.
    """
    metrics = {name: AnomalyMetrics("industrial") for name in sorted(set(rows["prompt_name"]))}
    anchors = {}
    for name in metrics:
        prompts = processor(text=[name], return_tensors="pt")
        groups = prompts.pop("prompt_groups")
        embeds = torch.nn.functional.normalize(clip.text_projection(clip.text_model(**prompts).pooler_output), dim=-1)
        pair = torch.stack([embeds[groups == group].mean(dim=0) for group in (0, 1)])
        anchors[name] = torch.nn.functional.normalize(pair, dim=-1)
    for row in (rows[index] for index in range(len(rows))):
        pixels = processor(images=row["image"], return_tensors="pt")["pixel_values"]
        tokens = clip.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        embeds = clip.visual_projection(clip.vision_model.post_layernorm(tokens))
        cosines = torch.nn.functional.normalize(embeds, dim=-1) @ anchors[row["prompt_name"]].T
        anomalous = (100 * cosines).softmax(dim=-1)[0, :, 1]
        side = round((len(anomalous) - 1) ** 0.5)
        grid = anomalous[1:].view(1, 1, side, side)
        upsampled = torch.nn.functional.interpolate(grid, size=pixels.shape[-2:], mode="bilinear", align_corners=True)
        mask = read_resized_mask(row, pixels.shape[-2:])
        metrics[row["prompt_name"]].update(upsampled[0], anomalous[:1], mask, [row["label"]])
    return mean_figures(metrics.values())


def write_textures(root: Path, families: tuple[str, ...], normal: int, anomalous: int, seed: int) -> None:
    write_texture_benchmark(
        root, families, SEEN_DEFECTS, normal=normal, anomalous=anomalous, size=PICTURE_SIZE, seed=seed
    )


def run(variant: str, seed: int, steps: int, batch_size: int, image_size: int | None, folder: Path) -> dict[str, Any]:
    """Train one model and score it."""
    recipe = recipe_of(variant, steps, batch_size)
    model, processor = start_model("embedded", recipe, seed, fresh=True, image_size=image_size)
    args = training_arguments(
        folder / "run",
        recipe,
        max_steps=steps,
        save_strategy="no",
        dataloader_num_workers=0,
        logging_steps=max(1, steps // 10),
        seed=seed,
    )
    samples = TrainingSamples(load_folder(folder / "seen"), processor, recipe.augment, seed)
    trainer = MoECLIPTrainer(model, args, samples, processor, recipe)
    trainer.train()
    unseen = load_folder(folder / "unseen")
    result = {"variant": variant, "seed": seed, "steps": steps, "batch_size": batch_size}
    result["trained"] = evaluate(Pretrained(model, processor), unseen).metrics
    for layer in model.moe_layers:
        layer.residual_weight = 0.0
    result["without_experts"] = evaluate(Pretrained(model, processor), unseen).metrics
    result["log"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    groups = defaultdict(list)
    for result in results:
        groups[result["variant"], result["steps"]].append(result)
    table = Table(
        "variant", "steps", "seeds", "pixel AUROC", "pixel AP", "image AUROC",
        "gain in pixel AUROC", "gain in pixel AP", "cosine", "drift", "grad norm of B, first", "last",
    )  # fmt: skip
    for (variant, steps), runs in groups.items():
        trained = {name: [result["trained"][name] for result in runs] for name in FIGURES}
        row = [spread(trained[name]) for name in ("pixel_auroc", "pixel_ap", "image_auroc")]
        if "without_experts" in runs[0]:
            for name in ("pixel_auroc", "pixel_ap"):
                row.append(spread([result["trained"][name] - result["without_experts"][name] for result in runs], "+"))
            for place, name in ((-1, "expert_cosine"), (-1, "expert_drift"), (0, "expert_grad_norm"),
                                (-1, "expert_grad_norm")):  # fmt: skip
                row.append(f"{mean(result['log'][place][name] for result in runs):.3g}")
        table.add_row(variant, str(steps), str(len(runs)), *row)
    Console(width=180).print(table)


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["paper", "paper-literal"], metavar="NAME",
                        help="recipes, plain-clip, or: " + "; ".join(VARIANTS))  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, help="edge of the input in pixels; the checkpoint's by default")
    parser.add_argument("--output", type=Path, default=Path("outputs/experts.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the file's results, run nothing")
    args = parser.parse_args()

    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {tuple(result[name] for name in ("variant", "seed", "steps", "image_size")) for result in results}
    folder = Path(tempfile.mkdtemp(prefix="experts-"))
    try:
        if not args.table:
            write_textures(folder / "seen", AUXILIARY_FAMILIES, normal=9, anomalous=27, seed=0)
            write_textures(folder / "unseen", VALIDATION_FAMILIES, normal=18, anomalous=18, seed=1)
            for seed in args.seeds:
                for variant in args.variants:
                    steps = 0 if variant == "plain-clip" else args.steps
                    if (variant, seed, steps, args.image_size) in done:
                        continue
                    if variant == "plain-clip":
                        clip = start_model("embedded", get_recipe("paper"), image_size=args.image_size)
                        figures = score_plain_clip(*clip, load_folder(folder / "unseen"))
                        result = {"variant": variant, "seed": seed, "steps": 0, "trained": figures}
                    else:
                        result = run(variant, seed, args.steps, args.batch_size, args.image_size, folder)
                    result["image_size"] = args.image_size
                    results.append(result)
                    with args.output.open("a") as file:
                        file.write(json.dumps(result) + "\n")
    finally:
        shutil.rmtree(folder)
    print_table(results)


if __name__ == "__main__":
    main()
