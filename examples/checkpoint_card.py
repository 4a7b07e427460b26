"""The model card of the embedded checkpoint: how it was made, and what was measured of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from moeclip_hf import MoECLIPConfig, MoECLIPModel, MoECLIPProcessor
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES, TEST_FAMILIES, UNSEEN_DEFECTS, VALIDATION_FAMILIES
from moeclip_hf.evaluation.results import METRICS, Metrics, markdown_table, mean_metrics
from moeclip_hf.model_card import CITATION, describe_limits

SHOWN = ("pixel_auroc", "pixel_ap", "image_auroc", "image_ap")
DATA = {
    "test": "ten families never adapted on, kinds of defect seen in training",
    "test_unseen_defects": "the same families, kinds of defect never seen",
    "photographs": "photographs with defects cut in, kinds seen in training",
}

NO_DIFFERENCE = 0.5
"""Percentage points, in the mean of the figures `SHOWN`, up to which another class name makes no difference."""

TEMPLATE = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Figures:
    """
    What was measured, 0 to 1.

    Args:
        documents: what `moeclip evaluate` wrote as results.json, by the name of the data.
        plain: the metrics of the CLIP without adaptation, by the same names.
        wrong: the metrics on the test families when every class is given the name of another one, for several ways to
            give them.
        unnamed: the metrics on the test families when every class is called "object".
    """

    documents: Mapping[str, dict[str, Any]]
    plain: Mapping[str, Mapping[str, float | None]]
    wrong: Sequence[Metrics]
    unnamed: Metrics

    def of(self, name: str) -> dict[str, Any]:
        """The evaluation of one of `DATA`."""
        result: dict[str, Any] = self.documents[name]["datasets"][0]
        return result


def write_card(checkpoint: Path, figures: Figures, trained_size: int) -> None:
    """Write the card into the folder of a checkpoint that was trained on images of `trained_size` pixels."""
    config = MoECLIPConfig.from_pretrained(checkpoint)
    processor = MoECLIPProcessor.from_pretrained(checkpoint)
    recipe = json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))
    told = ("base_model", "datasets", "selection")
    vision: Any = config.vision_config
    text: Any = config.text_config
    right, wrong = figures.of("test")["metrics"], mean_metrics(figures.wrong)
    card = TEMPLATE.read_text(encoding="utf-8").format(
        name=checkpoint.name,
        millions=MoECLIPModel.from_pretrained(checkpoint).num_parameters() / 1e6,
        size=processor.image_processor.size["height"],
        trained_size=trained_size,
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        patch=vision.patch_size,
        clip_size=vision.image_size,
        text_layers=text.num_hidden_layers,
        experts=config.num_experts,
        rank=config.lora_rank,
        top_k=config.num_experts_per_tok,
        moe_layers=listed(config.moe_layers),
        taps=listed(config.feature_layers),
        windows=listed(config.aggregation_sizes),
        recipe=markdown_table(
            [
                ["setting", "value"],
                *([k.replace("_", " "), listed(v)] for k, v in recipe.items() if k not in told and v is not None),
            ]
        ),
        auxiliary=words(AUXILIARY_FAMILIES),
        validation=words(VALIDATION_FAMILIES),
        test=words(TEST_FAMILIES),
        unseen=words(UNSEEN_DEFECTS),
        date=figures.documents["test"]["date"][:10],
        figures=figure_table(figures),
        image_sentence=judge_image_scores(figures),
        photographs_sentence=tell_photographs([group["group"] for group in figures.of("photographs")["groups"]]),
        name_sentence=judge_names(right, wrong),
        names=markdown_table(
            [
                ["class name given, on the test families", *(METRICS[name] for name in SHOWN)],
                ["the right one", *cells(right)],
                [f"that of another class, mean of {len(figures.wrong)} ways to give them", *cells(wrong)],
                ["`object`", *cells(figures.unnamed)],
            ]
        ),
        classes=class_table(figures),
        limits=describe_limits(processor.to_dict()),
        citation=CITATION,
    )
    (checkpoint / "README.md").write_text(card, encoding="utf-8")


def figure_table(figures: Figures) -> str:
    rows = [["", "images: normal / anomalous", *(METRICS[name] for name in SHOWN)]]
    for name, told in DATA.items():
        result = figures.of(name)
        rows.append([told, f"{result['normal']} / {result['anomalous']}", *cells(result["metrics"])])
        rows.append(["plain CLIP on them", "", *cells(figures.plain[name])])
    return markdown_table(rows)


def class_table(figures: Figures) -> str:
    rows = [["", *(METRICS[name] for name in SHOWN)]]
    for name in ("test", "photographs"):
        for group in figures.of(name)["groups"]:
            rows.append([f"{group['group'].replace('_', ' ')} ({name})", *cells(group["metrics"])])
    return markdown_table(rows)


def judge_names(right: Mapping[str, Any], wrong: Mapping[str, Any]) -> str:
    """Whether the right class name does better than that of another class, in one sentence."""
    points = 100 * mean(right[name] - wrong[name] for name in SHOWN)
    told = f"with the name of another class the figures are {abs(points):.1f} points"
    if points > NO_DIFFERENCE:
        return f"The class name matters: {told} lower, in the mean of all {len(SHOWN)}."
    if points < -NO_DIFFERENCE:
        return f"The right class name is no help: {told} higher, in the mean of all {len(SHOWN)}."
    return (
        f"The class name does not matter: {told} {'lower' if points > 0 else 'higher'}, in the mean of all "
        f"{len(SHOWN)}, where up to {NO_DIFFERENCE} points count as no difference."
    )


def judge_image_scores(figures: Figures) -> str:
    """On which data adaptation lowers image AUROC, as the table shows it, and what may be the cause."""
    place = SHOWN.index("image_auroc")
    lowered = []
    for name, told in DATA.items():
        plain, adapted = cells(figures.plain[name])[place], cells(figures.of(name)["metrics"])[place]
        if float(adapted) < float(plain):
            lowered.append(f"{told} ({plain} to {adapted})")
    if not lowered:
        return "Adaptation lowers image AUROC against the plain CLIP on none of them."
    return (
        f"Adaptation lowers image AUROC against the plain CLIP on {len(lowered)} of {len(DATA)}: "
        f"{'; '.join(lowered)}. The method's image score does without the class token, which CLIP's pretraining made "
        "the embedding of an image: its own image embedding is a mean of patches behind the depth-wise adapter, made "
        "in adaptation, and is compared with the abnormal anchor alone."
    )


def tell_photographs(classes: Sequence[str]) -> str:
    """Which of the photographs' classes adaptation saw as rendered families."""
    seen = [name for name in classes if name in AUXILIARY_FAMILIES]
    unseen = [name for name in classes if name not in AUXILIARY_FAMILIES]
    return (
        f"Of the photographs' classes, adaptation saw {words(seen, ' and ') or 'none'} by name and texture, as "
        f"rendered families, and {words(unseen, ' and ') or 'none'} not at all."
    )


def cells(metrics: Mapping[str, float | None]) -> list[str]:
    return ["-" if (value := metrics[name]) is None else f"{100 * value:.1f}" for name in SHOWN]


def listed(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)


def words(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join(name.replace("_", " ") for name in names)
