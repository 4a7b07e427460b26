"""Make the embedded checkpoint from nothing: pretrain, adapt, calibrate, evaluate, and write its card.

    python -m examples.make_checkpoint [--output-dir outputs/checkpoint] [--install]

Every part is a command that a reader can run alone; they are printed as they run. A part whose result is there is
passed over. A training or an evaluation that was cut off goes on, and any other part starts again. Data that was
rendered from other settings is made anew, with what was made from it; an evaluation of another model is done again.
After a change of how it is trained delete `trained/` and the checkpoint. No setting was chosen by what the card
reports: test families, unseen kinds of defect, and photographs. `--install` puts the result in the place of the
checkpoint that comes with the package.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage import data

from benchmarks.experts import score_plain_clip
from examples.checkpoint_card import Figures, write_card
from moeclip_hf import MoECLIPModel, MoECLIPOutput, MoECLIPProcessor
from moeclip_hf.data import load_folder, read_mask
from moeclip_hf.data.textures import add_defect, write_texture_benchmark
from moeclip_hf.data.textures.splits import (
    AUXILIARY_FAMILIES,
    SEEN_DEFECTS,
    TEST_FAMILIES,
    UNSEEN_DEFECTS,
    VALIDATION_FAMILIES,
)
from moeclip_hf.evaluation.protocol import find_differences
from moeclip_hf.evaluation.results import Metrics, mean_metrics
from moeclip_hf.evaluation.scoring import resize_mask
from moeclip_hf.metrics import AnomalyMetrics
from moeclip_hf.model_card import read_evaluation
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, Pretrained, load_pretrained
from moeclip_hf.training import get_recipe, start_model

PICTURE_SIZE = 256
# Folder: families, defects, normal and anomalous images a family, seed. What is reported had the seeds 4, 5 and 6 when
# an earlier adaptation was scored on it; all settings below were chosen on "validation" alone.
TEXTURES: dict[str, tuple[tuple[str, ...], tuple[str, ...], int, int, int]] = {
    "auxiliary": (AUXILIARY_FAMILIES, SEEN_DEFECTS, 36, 54, 1),
    "normal": (AUXILIARY_FAMILIES, SEEN_DEFECTS, 16, 0, 2),
    "validation": (VALIDATION_FAMILIES, SEEN_DEFECTS, 36, 36, 3),
    "test": (TEST_FAMILIES, SEEN_DEFECTS, 36, 45, 14),
    "test_unseen_defects": (TEST_FAMILIES, UNSEEN_DEFECTS, 36, 36, 15),
}
PHOTOGRAPHS = {"brick_wall": "brick", "grass": "grass", "gravel": "gravel"}  # class: scikit-image's photograph
CROPS_A_PHOTOGRAPH, PHOTOGRAPH_SEED = 60, 16
SETTINGS_FILE = "rendered_from.json"
REPORTED = ("test", "test_unseen_defects", "photographs")
SCORED_SIZE = 320  # finds more than at the size trained at, and as much as after training at it (docs/training.md)
TRAINING: Mapping[str, Any] = {
    "image-size": 256,
    "feature-layers": "4,6,8",
    "aggregation-sizes": "1,3",  # 5 patches are wider than most defects
    "batch-size": 16,
    "max-steps": 200,
    "halve-at": "80,107,133,153,173,187",
    "learning-rate": 4e-3,
    "expert-learning-rate": 1e-3,
    "residual-weight": 0.03,  # eight narrow blocks bear less of it than the paper's 24
}
SAVE_STEPS = 50
FALSE_ALARMS, PIXEL_FALSE_ALARMS = 0.1, 0.05
WRONG_NAMES = 3


def data_settings(name: str) -> dict[str, Any]:
    """All that a folder of data is rendered from, as its writer takes it."""
    if name == "photographs":
        return {"photographs": PHOTOGRAPHS, "defects": SEEN_DEFECTS, "crops": CROPS_A_PHOTOGRAPH,
                "size": PICTURE_SIZE, "seed": PHOTOGRAPH_SEED}  # fmt: skip
    families, defects, normal, anomalous, seed = TEXTURES[name]
    return {"families": families, "defects": defects, "normal": normal, "anomalous": anomalous,
            "size": PICTURE_SIZE, "seed": seed}  # fmt: skip


def write_photographs(
    root: Path, photographs: Mapping[str, str], defects: Sequence[str], *, crops: int, size: int, seed: int
) -> None:
    """Write crops of real photographs, every other one with a defect cut in, in MVTec AD's tree."""
    for number, (class_name, name) in enumerate(photographs.items()):
        photograph = getattr(data, name)()
        rng = np.random.default_rng((seed, number))
        for index in range(crops):
            top, left = rng.integers(0, np.array(photograph.shape[:2]) - size + 1)
            crop = photograph[top : top + size, left : left + size]
            image = np.repeat(crop[..., np.newaxis], 3, axis=2)
            kind = defects[index // 2 % len(defects)] if index % 2 else None
            if kind is not None:
                image, mask = add_defect(image, kind, rng)
                save(mask, root / class_name / "ground_truth" / kind / f"{index:03d}_mask.png")
            save(image, root / class_name / "test" / (kind or "good") / f"{index:03d}.png")


def save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def run(*arguments: object) -> None:
    """Print a command and run it; its failure ends this one."""
    words = [str(argument) for argument in arguments]
    print("$ python -m", shlex.join(words), flush=True)
    status = subprocess.run([sys.executable, "-m", *words], check=False).returncode
    if status:
        sys.exit(status)


def write_data(root: Path) -> None:
    """Render what is not there yet, or of other settings; a folder takes its name once it is whole."""
    for name in (*TEXTURES, "photographs"):
        folder, unfinished = root / name, root / f"{name}.unfinished"
        settings = data_settings(name)
        document = json.dumps(settings, indent=2)
        recorded = folder / SETTINGS_FILE
        if recorded.exists() and recorded.read_text(encoding="utf-8") == document:
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        if folder.exists():
            for made in made_from(root, name):
                shutil.rmtree(made, ignore_errors=True)
            folder.rename(unfinished)  # so that no half-deleted folder has its name
            shutil.rmtree(unfinished)
        write = write_photographs if name == "photographs" else write_texture_benchmark
        write(unfinished, **settings)
        (unfinished / SETTINGS_FILE).write_text(document, encoding="utf-8")
        unfinished.rename(folder)


def made_from(root: Path, name: str) -> tuple[Path, ...]:
    """What the parts after it make from a folder of data."""
    final = root / EMBEDDED_CHECKPOINT.name
    made = {"auxiliary": (root / "trained", final), "normal": (final,)}
    return made.get(name, (root / "evaluation" / name,))


def is_evaluated(results: Path, final: Path) -> bool:
    """Whether an evaluation is there, of this checkpoint and at the size that it scores at."""
    if not results.exists():
        return False
    document = read_evaluation(results)
    sizes = [result["settings"]["image_size"] for result in document["datasets"]]
    return sizes == [[SCORED_SIZE, SCORED_SIZE]] and not find_differences(final, document)


def make(root: Path) -> Path:
    """Run every part that is not done; the folder of the finished checkpoint, in float16."""
    clip, trained, final = root / "clip", root / "trained", root / EMBEDDED_CHECKPOINT.name
    if not (clip / "tokenizer.json").exists():
        run("examples.pretrain_tiny_clip", "--output-dir", clip)
    write_data(root)
    if not (trained / "config.json").exists():
        options = [word for name, value in TRAINING.items() for word in (f"--{name}", value)]
        run("moeclip_hf.cli", "train", "--dataset", root / "auxiliary", "--clip", clip, "--output-dir", trained,
            "--resume", "--save-steps", SAVE_STEPS, "--tracker", "none", *options)  # fmt: skip
    if not final.exists():  # a checkpoint takes its name once it is calibrated
        unfinished = root / f"{final.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        store_for_scoring(trained, unfinished)
        run("moeclip_hf.cli", "calibrate", "--data-dir", root / "normal", "--model", unfinished, "--in-place",
            "--false-alarm-rate", FALSE_ALARMS, "--pixel-false-alarm-rate", PIXEL_FALSE_ALARMS)  # fmt: skip
        unfinished.rename(final)
    for name in REPORTED:
        results = root / "evaluation" / name
        if not is_evaluated(results / "results.json", final):
            run("moeclip_hf.cli", "evaluate", "--data-dir", root / name, "--model", final, "--output-dir", results)
    return final


def store_for_scoring(trained: Path, final: Path) -> None:
    """Write a checkpoint in float16, half as large, that scores images at a size of its own."""
    MoECLIPModel.from_pretrained(trained, dtype=torch.float16).save_pretrained(final)
    processor = MoECLIPProcessor.from_pretrained(trained)
    processor.image_processor.size = {"height": SCORED_SIZE, "width": SCORED_SIZE}
    processor.save_pretrained(final)
    shutil.copy(trained / "recipe.json", final)


def read_figures(root: Path, final: Path) -> Figures:
    """All that the card reports: what the evaluations wrote, the CLIP unadapted, and other class names."""
    documents = {
        name: json.loads((root / "evaluation" / name / "results.json").read_text(encoding="utf-8"))
        for name in REPORTED
    }
    pretrained = load_pretrained(final, device="cpu", dtype="float32")
    clip, processor = start_model(str(root / "clip"), get_recipe("paper"), image_size=SCORED_SIZE)
    plain = {name: score_plain_clip(clip, processor, load_folder(root / name)) for name in REPORTED}
    rows = load_folder(root / "test")
    classes = sorted(set(rows["prompt_name"]))
    shifted = (classes[shift:] + classes[:shift] for shift in range(1, WRONG_NAMES + 1))
    namings = [dict(zip(classes, names, strict=True)) for names in shifted]
    *wrong, unnamed = evaluate_named(pretrained, rows, [*namings, dict.fromkeys(classes, "object")])
    return Figures(documents, plain, wrong, unnamed)


@torch.inference_mode()
def evaluate_named(pretrained: Pretrained, rows: Any, namings: Sequence[Mapping[str, str]]) -> list[Metrics]:
    """
    What `evaluate` gives when classes go by other names, for several ways to name them.

    One pass over the images serves all, since a name reaches no block of the vision tower.

    Args:
        pretrained: the checkpoint.
        rows: from [`moeclip_hf.data.load_folder`].
        namings: for each way the name that is given to a class, by its own.

    Returns:
        For each way the mean over the groups.
    """
    model, processor = pretrained
    anchors = {name: pretrained.encode_class(name)[0] for naming in namings for name in naming.values()}
    groups = dict.fromkeys(rows["group"])
    tallies = [{group: AnomalyMetrics("industrial") for group in groups} for _ in namings]
    for row in (rows[index] for index in range(len(rows))):
        pixels = processor(images=row["image"], return_tensors="pt")["pixel_values"]
        outputs = model(pixels, text_embeds=anchors[namings[0][row["prompt_name"]]][None])
        patch_embeds = torch.stack(outputs.patch_embeds, dim=1)
        mask = resize_mask(read_mask(row), pixels.shape[-2:])[None]
        for naming, tally in zip(namings, tallies, strict=True):
            normal, abnormal = anchors[naming[row["prompt_name"]]]
            logits = 100 * (patch_embeds @ (abnormal - normal)).view_as(outputs.anomaly_logits)
            maps = processor.post_process_anomaly_maps(
                MoECLIPOutput(anomaly_logits=logits), pixels.shape[-2:], "industrial"
            )
            scores = (outputs.image_embeds @ abnormal + 1) / 2
            tally[row["group"]].update(maps, scores, mask, [row["label"]])
    return [mean_metrics([metrics.compute() for metrics in tally.values()]) for tally in tallies]


def install(checkpoint: Path) -> None:
    """Put a checkpoint in the place of the embedded one, which is moved away once the other is beside it, whole."""
    incoming, outgoing = (EMBEDDED_CHECKPOINT.with_name(f"{EMBEDDED_CHECKPOINT.name}.{end}") for end in ("new", "old"))
    shutil.rmtree(incoming, ignore_errors=True)
    shutil.copytree(checkpoint, incoming)
    shutil.rmtree(outgoing, ignore_errors=True)
    if EMBEDDED_CHECKPOINT.exists():  # an earlier call may have been cut off between the two moves
        EMBEDDED_CHECKPOINT.rename(outgoing)
    incoming.rename(EMBEDDED_CHECKPOINT)
    shutil.rmtree(outgoing, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/checkpoint"))
    parser.add_argument("--install", action="store_true", help="into the package, in place of the embedded checkpoint")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    final = make(args.output_dir)
    write_card(final, read_figures(args.output_dir, final), TRAINING["image-size"])
    print(final / "README.md")
    if args.install:
        install(final)


if __name__ == "__main__":
    main()
