"""Ablations as one command: variants of MoECLIP trained over seeds, as tables and a picture beside the paper's.

    python -m examples.ablation --clip openai/clip-vit-large-patch14-336
    python -m examples.ablation --clip DIR_OR_ID --train-dir visa --test-dir mvtec headct --data-dir /data
    python -m examples.ablation --clip embedded --variants full K=1,2,8 k=1 r=4 --steps 500

Every variant is trained on one data set, and evaluated on others by the benchmark protocol. What is done is kept in
runs.jsonl and not done again; a training that was cut short goes on. Of a MoECLIP, as "embedded" is, the CLIP is taken
with the configuration: what no variant sets, lambda and taps among it, is as there. docs/ablation.md tells the rest.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn
from transformers.utils import logging

from examples.ablation_report import COSINE, PUBLISHED, figure_table, summarise, write_reports
from moeclip_hf import MoECLIPConfig, MoECLIPModel
from moeclip_hf.data import load_data
from moeclip_hf.data.textures import write_texture_benchmark
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES, SEEN_DEFECTS, TEST_FAMILIES
from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.evaluation import evaluate
from moeclip_hf.evaluation.protocol import provenance
from moeclip_hf.evaluation.results import mean_metrics
from moeclip_hf.modeling.moe_lora import MoELora, MoELoraOutput, expert_codes, expert_gram
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, fetch_clip, load_pretrained
from moeclip_hf.training import RECIPES, Recipe, get_recipe, start_model, train, training_arguments
from moeclip_hf.training.recipes import apply_recipe

# The paper's model, written out so that K=4 is found to be the full model and not trained once more.
FULL: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "lora_rank": 8,
    "use_fofs": True,
    "aggregation_sizes": [1, 3, 5],
}
# What a variant changes of the full model, or of the recipe.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-fofs": {"use_fofs": False},
    "no-etf": {"etf_loss_coef": 0.0},
    "no-fofs-no-etf": {"use_fofs": False, "etf_loss_coef": 0.0},
    "no-paa": {"aggregation_sizes": [1]},
    "no-depthwise": {"depthwise": False},
}
SWEEPS = {"K": "num_experts", "k": "num_experts_per_tok", "r": "lora_rank"}
DEFAULT_VARIANTS = (*VARIANTS, "K=1", "K=2", "K=4", "K=8")

SAVE_STEPS = 50
TEXTURE_SIZE = 256
TRAIN_TEXTURES, TEST_TEXTURES = "auxiliary textures", "test textures"


def variant_names(text: str) -> list[str]:
    """A variant, or the variants of a sweep: `K=1,2,8` is `K=1`, `K=2` and `K=8`."""
    if text in VARIANTS:
        return [text]
    if sweep := re.fullmatch(r"([Kkr])=(\d+(?:,\d+)*)", text):
        return [f"{sweep[1]}={int(number)}" for number in sweep[2].split(",")]
    raise argparse.ArgumentTypeError(f"no variant '{text}'; there are {', '.join(VARIANTS)}, and K=N, k=N, r=N")


def changes_of(variant: str) -> dict[str, Any]:
    """What a variant changes, by the names of `MoECLIPConfig` and `Recipe`."""
    if variant in VARIANTS:
        return VARIANTS[variant]
    letter, number = variant.split("=")
    changes = {SWEEPS[letter]: int(number)}
    if letter == "K":
        changes["num_experts_per_tok"] = min(FULL["num_experts_per_tok"], int(number))
    return changes


@dataclass(frozen=True)
class Run:
    """
    One training and its evaluation: all that decides what it comes to.

    Args:
        clip: a CLIP, or a MoECLIP for its CLIP and configuration: folder, Hub id or "embedded".
        clip_digest: of its files, from [`digest_clip`].
        train: the data to train on, as `load_data` takes it.
        test: the data to evaluate on.
        recipe ([`Recipe`])
        model: fields of `MoECLIPConfig`.
        steps: of training; the recipe's epochs if `None`.
        seed: of everything random.
        depthwise: whether patches are mixed with their neighbours for the image embedding.
        image_size: edge in pixels of the model's input; the checkpoint's if `None`.
    """

    clip: str
    clip_digest: str
    train: str
    test: tuple[str, ...]
    recipe: Recipe
    model: dict[str, Any]
    steps: int | None
    seed: int
    depthwise: bool = True
    image_size: int | None = None

    @classmethod
    def of(cls, variant: str, seed: int, args: argparse.Namespace, clip_digest: str) -> "Run":
        """The run of a variant and a seed under the settings of the command line."""
        model = FULL | changes_of(variant)
        expert_learning_rate = args.expert_learning_rate
        if expert_learning_rate is None and args.learning_rate is not None:
            usual = get_recipe(args.recipe)
            expert_learning_rate = usual.expert_learning_rate / usual.learning_rate * args.learning_rate
        given = {
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "expert_learning_rate": expert_learning_rate,
            "halve_at": None if args.halve_at is None else tuple(args.halve_at),
            "etf_loss_coef": model.pop("etf_loss_coef", None),
        }
        depthwise = model.pop("depthwise", True)
        recipe = get_recipe(args.recipe, **{name: value for name, value in given.items() if value is not None})
        data = (args.train_dir, tuple(args.test_dir))
        return cls(args.clip, clip_digest, *data, recipe, model, args.steps, seed, depthwise, args.image_size)

    @property
    def key(self) -> str:
        return key_of(asdict(self))


def key_of(settings: Mapping[str, Any]) -> str:
    """A name that tells runs of other settings apart; the same for a `Run` as a dict and for what JSON makes of it."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def digest_clip(clip: str) -> str:
    """Tells CLIPs of one name apart: a digest of the files of configuration and weights, of a MoECLIP all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(fetch_clip(EMBEDDED_CHECKPOINT if clip == "embedded" else clip).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def check_runs(runs: Mapping[str, Run]) -> None:
    """
    Refuse what cannot be trained before hours are spent on what can.

    Args:
        runs: one a variant, by its name.

    Raises:
        CheckpointError: there is no such CLIP.
        MoECLIPError: a variant does not fit it.
    """
    for variant, run in runs.items():
        source = EMBEDDED_CHECKPOINT if run.clip == "embedded" else run.clip
        try:
            apply_recipe(MoECLIPConfig.from_pretrained(source, **run.model), run.recipe)
        except OSError as error:
            raise CheckpointError(f"{run.clip}: no CLIP can be read: {' '.join(str(error).split())}") from error
        except ValueError as error:
            raise MoECLIPError(f"variant {variant}: {error}") from error


@contextmanager
def watched_cosines(model: MoECLIPModel) -> Iterator[dict[int, list[float]]]:
    """
    Measure how alike the experts answer, in all forward passes of the block.

    Yields:
        a list a mixture of experts, by its block counted from 1: for every image, the mean cosine between the outputs
        of two experts, chosen or not, over pairs and patches. It stays empty for a single expert.
    """
    cosines: dict[int, list[float]] = {block + 1: [] for block in model.config.moe_layers}

    def watch(block: int) -> Callable[..., None]:
        def measure(experts: MoELora, inputs: tuple[Any, ...], output: MoELoraOutput) -> None:
            if (num_experts := model.config.num_experts) > 1:
                codes = expert_codes(inputs[0][:, 1:], experts.lora_A)
                gram = expert_gram(codes, experts.lora_B).mean(dim=1)
                pairs = gram.sum(dim=(1, 2)) - gram.diagonal(dim1=1, dim2=2).sum(dim=1)
                cosines[block] += (pairs / (num_experts * (num_experts - 1))).tolist()

        return measure

    layers: nn.ModuleList = model.moe_layers
    with ExitStack() as hooks:
        for block, experts in zip(cosines, layers, strict=True):
            hooks.callback(experts.register_forward_hook(watch(block)).remove)
        yield cosines


def leave_out_depthwise_convolution(model: MoECLIPModel) -> None:
    """Make the depth-wise convolution of the image embedding the identity, and keep it so in training."""
    kernels = model.depthwise_adapter.depthwise.weight
    with torch.no_grad():
        nn.init.dirac_(kernels, groups=len(kernels))
    kernels.register_hook(torch.zeros_like)


def execute(run: Run, train_rows: Any, test_rows: Sequence[Any], folder: Path) -> dict[str, Any]:
    """Train a model, or go on with what `folder` holds of it, and evaluate it; figures from 0 to 1, cosines to -1."""
    if not (folder / "config.json").exists():  # written last: with it the model is whole
        model, processor = start_model(
            run.clip, run.recipe, run.seed, fresh=True, image_size=run.image_size, **run.model
        )
        if not run.depthwise:
            leave_out_depthwise_convolution(model)
        settings = {"save_steps": SAVE_STEPS, "save_total_limit": 1, "disable_tqdm": False}
        args = training_arguments(folder, run.recipe, max_steps=run.steps or -1, seed=run.seed, **settings)
        train(model, processor, train_rows, run.recipe, args, resume=True)
    pretrained = load_pretrained(folder, dtype=torch.float32)
    with watched_cosines(pretrained.model) as cosines:
        results = [evaluate(pretrained, rows) for rows in test_rows]
    by_block = {f"{COSINE}_block_{block}": mean(images) if images else None for block, images in cosines.items()}
    defined = [cosine for cosine in by_block.values() if cosine is not None]
    figures = mean_metrics([result.metrics for result in results])
    origin = provenance(pretrained)
    return {
        "run": asdict(run),
        "figures": figures | {COSINE: mean(defined) if defined else None} | by_block,
        "datasets": {result.dataset: result.metrics for result in results},
        "versions": origin["versions"],
        "date": origin["date"],
    }


def read_done(path: Path) -> dict[str, dict[str, Any]]:
    """
    What earlier calls have done, by the key of its run.

    Raises:
        MoECLIPError: a line is damaged.
    """
    done = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            result = json.loads(line)
            done[key_of(result["run"])] = result
        except (ValueError, KeyError, TypeError) as error:
            raise MoECLIPError(f"{path}: line {number} is damaged: delete it, and its run is done again.") from error
    return done


def render_textures(folder: Path) -> dict[str, Path]:
    """Textures to train on, and others of families that are not among them, rendered once; their folders by name."""
    rendered = {TRAIN_TEXTURES: folder / "auxiliary", TEST_TEXTURES: folder / "test"}
    for seed, (target, families) in enumerate(
        zip(rendered.values(), (AUXILIARY_FAMILIES, TEST_FAMILIES), strict=True)
    ):
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                whole = Path(unfinished, target.name)
                write_texture_benchmark(
                    whole, families, SEEN_DEFECTS, normal=18, anomalous=36, size=TEXTURE_SIZE, seed=seed
                )
                whole.rename(target)
    return rendered


def report(runs: Mapping[str, Sequence[Run]], done: Mapping[str, dict[str, Any]], output_dir: Path) -> list[list[str]]:
    """Write what is done of the planned runs as tables and a picture; returns the table."""
    of_variants = {
        variant: [done[run.key] for run in of_variant if run.key in done] for variant, of_variant in runs.items()
    }
    rows = [summarise(variant, results) for variant, results in of_variants.items() if results]
    write_reports(rows, [result for results in of_variants.values() for result in results], output_dir)
    return figure_table(rows)


def ablate(args: argparse.Namespace) -> None:
    """Do the runs that are not done, and write the reports after each."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    variants = list(dict.fromkeys(chain.from_iterable(args.variants)))
    clip_digest = digest_clip(args.clip)
    runs = {variant: [Run.of(variant, seed, args, clip_digest) for seed in args.seeds] for variant in variants}
    check_runs({variant: of_variant[0] for variant, of_variant in runs.items()})
    sources = [args.train_dir, *args.test_dir]
    rendered = render_textures(args.output_dir / "textures") if {TRAIN_TEXTURES, TEST_TEXTURES} & {*sources} else {}
    train_rows, *test_rows = (load_data(rendered.get(source, source), args.data_dir) for source in sources)
    done = read_done(args.output_dir / "runs.jsonl")

    # Seed by seed, so that what is done at any time compares.
    planned = [(variant, runs[variant][number]) for number in range(len(args.seeds)) for variant in variants]
    for variant, run in planned:
        if run.key not in done:
            Console().print(f"{variant}, seed {run.seed}")
            folder = args.output_dir / f"unfinished-{run.key}"
            done[run.key] = execute(run, train_rows, test_rows, folder)
            with (args.output_dir / "runs.jsonl").open("a") as file:
                file.write(json.dumps({"variant": variant} | done[run.key]) + "\n")
            shutil.rmtree(folder)
            report(runs, done, args.output_dir)
    heading, *body = (row[: -len(PUBLISHED)] for row in report(runs, done, args.output_dir))
    table = Table(*(Column(name, no_wrap=not number) for number, name in enumerate(heading)), title="ablation")
    for row in body:
        table.add_row(*row)
    Console().print(table)
    Console().print(f"All tables, and the picture: {args.output_dir}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = "folder, benchmark, index file or Hub data set"
    parser.add_argument("--clip", required=True, help="CLIP, or a MoECLIP for its CLIP: folder, Hub id or embedded")
    parser.add_argument("--train-dir", metavar="DATA", default=TRAIN_TEXTURES,
                        help=f"{data}, with masks; %(default)s, rendered, by default")  # fmt: skip
    parser.add_argument("--test-dir", metavar="DATA", nargs="+", default=[TEST_TEXTURES],
                        help=f"{data}; figures are means over all of them; {TEST_TEXTURES} by default")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, help="folder that holds the benchmarks that are named")
    variants = f"{', '.join(VARIANTS)}, K=1,2,8, k=1, r=4; the picture compares with the first"
    parser.add_argument("--variants", nargs="+", type=variant_names, default=[list(DEFAULT_VARIANTS)],
                        metavar="NAME", help=variants)  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every training; the recipe's epochs by default")
    parser.add_argument("--batch-size", type=int, help="the recipe's by default")
    parser.add_argument("--learning-rate", type=float, help="the recipe's by default")
    parser.add_argument("--expert-learning-rate", type=float, help="of routers and experts; "
                        "by default the recipe's, scaled as --learning-rate scales the others")  # fmt: skip
    parser.add_argument("--halve-at", type=int, nargs="+", metavar="STEP", help="the recipe's steps by default")
    parser.add_argument("--image-size", type=int, help="edge of the input in pixels; the checkpoint's by default")
    parser.add_argument("--recipe", choices=RECIPES, default="paper")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/ablation"))
    args = parser.parse_args()

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        ablate(args)
    except MoECLIPError as error:
        sys.exit(f"ablation.py: {error}")


if __name__ == "__main__":
    main()
