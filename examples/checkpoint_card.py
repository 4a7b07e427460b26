"""The model card of the embedded checkpoint: how it was made, and what was measured of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeclip_hf import MoECLIPConfig, MoECLIPModel, MoECLIPProcessor
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES, TEST_FAMILIES, UNSEEN_DEFECTS, VALIDATION_FAMILIES
from moeclip_hf.evaluation.results import METRICS, markdown_table

SHOWN = ("pixel_auroc", "pixel_ap", "image_auroc", "image_ap")
DATA = {
    "test": "ten families never adapted on, kinds of defect seen in training",
    "test_unseen_defects": "the same families, kinds of defect never seen",
    "photographs": "photographs with defects cut in, kinds seen in training",
}

TEMPLATE = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Figures:
    """
    What was measured, 0 to 1.

    Args:
        documents: what `moeclip evaluate` wrote as results.json, by the name of the data.
        plain: the metrics of the CLIP without adaptation, by the same names.
        renamed: the metrics on the test families when every image is given another class name, by what it is given.
    """

    documents: Mapping[str, dict[str, Any]]
    plain: Mapping[str, Mapping[str, float | None]]
    renamed: Mapping[str, Mapping[str, float | None]]

    def of(self, name: str) -> dict[str, Any]:
        """The evaluation of one of `DATA`."""
        result: dict[str, Any] = self.documents[name]["datasets"][0]
        return result


def write_card(checkpoint: Path, figures: Figures) -> None:
    """Write the card into a checkpoint's folder."""
    config = MoECLIPConfig.from_pretrained(checkpoint)
    processor = MoECLIPProcessor.from_pretrained(checkpoint)
    recipe = json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))
    told = ("base_model", "datasets", "selection")
    vision: Any = config.vision_config
    text: Any = config.text_config
    right = figures.of("test")["metrics"]
    card = TEMPLATE.read_text(encoding="utf-8").format(
        name=checkpoint.name,
        millions=MoECLIPModel.from_pretrained(checkpoint).num_parameters() / 1e6,
        size=processor.image_processor.size["height"],
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
        name_sentence=judge_names(right, figures.renamed),
        names=markdown_table(
            [
                ["class name given, on the test families", *(METRICS[name] for name in SHOWN)],
                ["the right one", *cells(right)],
                *([told, *cells(metrics)] for told, metrics in figures.renamed.items()),
            ]
        ),
        classes=class_table(figures),
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


def judge_names(right: Mapping[str, float | None], renamed: Mapping[str, Mapping[str, float | None]]) -> str:
    """Whether the right class name does better than that of another class, in one sentence."""
    wrong = next(iter(renamed.values()))
    lost = [name for name in SHOWN if (wrong[name] or 0) < (right[name] or 0)]
    if len(lost) == len(SHOWN):
        return "The class name matters: with the name of another class all figures are lower."
    if not lost:
        return "The class name does not matter here: that of another class does as well, or better."
    return f"With the name of another class {listed([METRICS[name] for name in lost])} are lower, the others are not."


def cells(metrics: Mapping[str, float | None]) -> list[str]:
    return ["-" if (value := metrics[name]) is None else f"{100 * value:.1f}" for name in SHOWN]


def listed(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)


def words(names: tuple[str, ...]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)
