"""What the experts of a trained MoECLIP are worth, by the way in which they are trained.

    python -m benchmarks.experts --variants paper paper-literal --seeds 0 1 2 --output outputs/experts.jsonl

Trains the CLIP of the embedded checkpoint, its MoECLIP parts drawn anew, on the auxiliary families of textures, and
scores the validation families, which it never saw, as the benchmarks are scored: once as trained, and once with the
residual weight set to 0, which takes the experts out. A run that the output file already holds is not repeated, unless
the CLIP is another. The tables of docs/training.md are `--table` of that file.

"norm floor" replaces the constant that the package adds to the norm of the experts' answer before it divides by it,
1e-6, while the variant trains and is scored. The ETF term's cosines take outputs shorter than the same constant as of
that length.
"""

import argparse
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from moeclip_hf import MoECLIPModel, MoECLIPProcessor
from moeclip_hf.data import load_folder, read_mask
from moeclip_hf.data.textures.benchmark import write_texture_benchmark
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES, SEEN_DEFECTS, VALIDATION_FAMILIES
from moeclip_hf.evaluation import evaluate
from moeclip_hf.evaluation.results import markdown_table
from moeclip_hf.evaluation.scoring import resize_mask
from moeclip_hf.metrics import AnomalyMetrics
from moeclip_hf.modeling import moe_lora
from moeclip_hf.modeling.processing_moeclip import smooth, upsample
from moeclip_hf.pretrained import Pretrained
from moeclip_hf.stored_weights import MOECLIP_PARTS, digest_weights
from moeclip_hf.training import MoECLIPTrainer, Recipe, TrainingSamples, get_recipe, start_model, training_arguments

PICTURE_SIZE = 256
TABULATED = ("pixel_auroc", "pixel_ap", "pixel_aupro", "image_auroc")
FIGURES = (*TABULATED, "image_ap")

# Runs here are some 50 times shorter than the paper's 20 epochs, and learn 4 times as fast.
SPEEDUP = 4

# The paper's lambda, where a variant sets none, and windows: the embedded checkpoint's configuration has others.
RESIDUAL_WEIGHT = 0.1
AGGREGATION_SIZES = (1, 3, 5)

# Every variant changes the literal recipe of the paper; `expert_speed` is the experts' learning rate over the others',
# `norm_floor` no part of a recipe.
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
    "literal, norm floor 0.01": {"norm_floor": 0.01},
    "literal, lambda 0.03": {"residual_weight": 0.03},
    "paper, lambda 0.03": {"max_grad_norm": 1.0, "residual_weight": 0.03},
    "B, G, lambda 0.3": {"expert_std": 0.02, "router_std": 0.02, "residual_weight": 0.3},
    "B, G, expert lr x 10, lambda 0.3": {
        "expert_std": 0.02, "router_std": 0.02, "expert_speed": 10, "residual_weight": 0.3,
    },
}  # fmt: skip

# What tells runs apart, but for the seed.
SETTINGS = ("variant", "steps", "batch_size", "image_size", "clip")


def recipe_of(variant: str, steps: int, batch_size: int) -> Recipe:
    """The recipe of a variant, faster and with its milestone at two thirds of the run."""
    recipe = get_recipe("paper-literal" if variant in VARIANTS else variant)
    changes = {"residual_weight": RESIDUAL_WEIGHT if recipe.residual_weight is None else recipe.residual_weight}
    changes |= VARIANTS.get(variant, {})
    changes.pop("norm_floor", None)
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


@contextmanager
def norm_floor(floor: float) -> Iterator[None]:
    """Within the context the package adds `floor` to the norm of the experts' answer, instead of its own constant."""
    own = moe_lora._NORM_EPS
    moe_lora._NORM_EPS = floor
    try:
        yield
    finally:
        moe_lora._NORM_EPS = own


def mean_figures(metrics: Any) -> dict[str, float]:
    computed = [each.compute() for each in metrics]
    return {name: mean(figures[name] for figures in computed) for name in FIGURES}


@torch.no_grad()
def score_plain_clip(clip: MoECLIPModel, processor: MoECLIPProcessor, rows: Any) -> dict[str, float]:
    """
    CLIP without adaptation: patches and class token behind the post-layernorm and the visual projection, by their
    cosines to the same sentences behind the text projection, a softmax of the two cosines times 100. Patches make a
    map, smoothed and upsampled as the protocol does it; the image score is the mean of its maximum and the class
    token's probability.
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
        grid = smooth(anomalous[1:].view(1, side, side), "industrial")
        mask = resize_mask(read_mask(row), pixels.shape[-2:])[None]
        anomaly_map = upsample(grid, pixels.shape[-2:])
        metrics[row["prompt_name"]].update(anomaly_map, anomalous[:1], mask, [row["label"]])
    return mean_figures(metrics.values())


def write_textures(root: Path, families: tuple[str, ...], normal: int, anomalous: int, seed: int) -> None:
    write_texture_benchmark(
        root, families, SEEN_DEFECTS, normal=normal, anomalous=anomalous, size=PICTURE_SIZE, seed=seed
    )


def run(variant: str, seed: int, steps: int, batch_size: int, image_size: int | None, folder: Path) -> dict[str, Any]:
    """Train one model and score it; figures as trained and without experts, and the log."""
    with norm_floor(VARIANTS.get(variant, {}).get("norm_floor", moe_lora._NORM_EPS)):
        recipe = recipe_of(variant, steps, batch_size)
        model, processor = start_model(
            "embedded", recipe, seed, fresh=True, image_size=image_size, aggregation_sizes=list(AGGREGATION_SIZES)
        )
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
        trained = evaluate(Pretrained(model, processor), unseen).metrics
        for layer in model.moe_layers:
            layer.residual_weight = 0.0
        without_experts = evaluate(Pretrained(model, processor), unseen).metrics
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"trained": trained, "without_experts": without_experts, "log": log}


def smallest_load(entry: dict[str, Any]) -> float:
    """The smallest share of the tokens' choices that an expert of any block got."""
    return min(share for name, share in entry.items() if name.startswith("expert_load/"))


def tabulate(results: list[dict[str, Any]]) -> list[list[str]]:
    """A heading and a row for all seeds of a variant under the same settings."""
    groups = defaultdict(list)
    for result in results:
        groups[tuple(result.get(name) for name in SETTINGS)].append(result)
    rows = [[
        "variant", "steps", "batch", "pixels", "CLIP", "seeds", "pixel AUROC", "pixel AP", "AUPRO", "image AUROC",
        "gain in pixel AUROC", "gain in pixel AP", "cosine", "drift", "smallest load", "grad norm of B, first", "last",
    ]]  # fmt: skip
    for settings, runs in groups.items():
        row = ["-" if value is None else str(value) for value in settings] + [str(len(runs))]
        for name in TABULATED:
            row.append(spread([result["trained"][name] for result in runs]))
        if "without_experts" in runs[0]:
            for name in ("pixel_auroc", "pixel_ap"):
                row.append(spread([result["trained"][name] - result["without_experts"][name] for result in runs], "+"))
            first, last = ([result["log"][place] for result in runs] for place in (0, -1))
            row += [f"{mean(entry[name] for entry in last):.3g}" for name in ("expert_cosine", "expert_drift")]
            row.append(f"{mean(map(smallest_load, last)):.3g}")
            row += [f"{mean(entry['expert_grad_norm'] for entry in entries):.3g}" for entries in (first, last)]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return rows


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{deviation}"


def run_missing(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Run what the results lack of what the options ask for, and add it to them and to the output file."""
    plain, processor = start_model("embedded", get_recipe("paper"), image_size=args.image_size)
    weights = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith(MOECLIP_PARTS)}
    common = {"image_size": processor.image_processor.size["height"], "clip": digest_weights(weights)[:8]}
    done = {tuple(result.get(name) for name in (*SETTINGS, "seed")) for result in results}
    folder = Path(tempfile.mkdtemp(prefix="experts-"))
    try:
        write_textures(folder / "seen", AUXILIARY_FAMILIES, normal=9, anomalous=27, seed=0)
        write_textures(folder / "unseen", VALIDATION_FAMILIES, normal=18, anomalous=18, seed=1)
        for seed in args.seeds:
            for variant in args.variants:
                trains = variant != "plain-clip"
                steps, batch_size = (args.steps, args.batch_size) if trains else (0, None)
                result = {"variant": variant, "steps": steps, "batch_size": batch_size, **common, "seed": seed}
                if tuple(result[name] for name in (*SETTINGS, "seed")) in done:
                    continue
                if trains:
                    result |= run(variant, seed, steps, batch_size, args.image_size, folder)
                else:
                    result["trained"] = score_plain_clip(plain, processor, load_folder(folder / "unseen"))
                results.append(result)
                with args.output.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    finally:
        shutil.rmtree(folder)


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
    if not args.table:
        run_missing(args, results)
    print(markdown_table(tabulate(results)))


if __name__ == "__main__":
    main()
