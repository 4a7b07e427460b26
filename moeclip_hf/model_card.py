"""The model card of a published repository: metadata for the Hub, and a text of what is known and nothing else.

The written part stands between two comments, `BEGIN` and `END`. A card that is there already keeps all that stands
outside of them, and is the user's own where it has none; only what a template left unfilled is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from moeclip_hf.data import find_benchmark
from moeclip_hf.errors import CheckpointError
from moeclip_hf.evaluation.results import METRICS, UNDEFINED, markdown_table
from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
from moeclip_hf.modeling.image_processing_moeclip import MoECLIPImageProcessor
from moeclip_hf.pretrained import is_hub_id
from moeclip_hf.registration import PIPELINE_TASK

BEGIN = "<!-- moeclip: written by `moeclip push`, anew each time; what stands outside is kept -->"
END = "<!-- moeclip: end -->"

PIPELINE_TAG = "image-segmentation"
"""The Hub's own task that is nearest: an image in, a map of its pixels out."""

_TASK_NAME = "Zero-shot anomaly detection"
_TAGS = ("moeclip", "anomaly-detection", "zero-shot", PIPELINE_TASK)
_PAPER = "https://arxiv.org/abs/2603.03101"

# All that transformers' own `push_to_hub` puts into the template.
_TRANSFORMERS_SENTENCE = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)

CITATION = """```bibtex
@inproceedings{park2026moeclip,
  title     = {{MoECLIP}},
  author    = {Park and Seo and Kang and Park},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2026},
  url       = {https://arxiv.org/abs/2603.03101}
}
```"""


@dataclass(frozen=True)
class CardFacts:
    """
    What a card tells beside what stands in the checkpoint's own files.

    Args:
        evaluation: the document that `moeclip evaluate` writes as `results.json`.
        base_model: Hub id of the CLIP.
        datasets: that it was trained on, Hub ids where there are any.
        license: of the weights, as the Hub names licences.
    """

    evaluation: dict[str, Any] | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None


def read_evaluation(path: Path) -> dict[str, Any]:
    """
    Read what `moeclip evaluate` wrote as `results.json`.

    Raises:
        CheckpointError: if it is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        for result in document["datasets"]:
            if set(result["metrics"]) != set(METRICS):
                raise KeyError("metrics")
            _ = result["dataset"], result["settings"]["weights"], result["settings"]["dtype"]
        _ = document["date"], document["versions"]["moeclip-hf"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not the results.json of `moeclip evaluate` ({error}).") from error
    return document


def read_json(path: Path) -> dict[str, Any]:
    """
    Read a file of settings.

    Raises:
        CheckpointError: if it holds none.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: holds no settings but a {type(settings).__name__}.")
    return settings


def compose_card(
    folder: Path,
    config: dict[str, Any],
    is_adapter: bool,
    repo_id: str,
    facts: CardFacts,
    present: str | None,
    keep_results: bool = True,
) -> str:
    """
    Write a repository's model card.

    Args:
        folder: of the checkpoint, for its processor and recipe.
        config: of the model or, of an adapter, of the adapter.
        is_adapter: which of both.
        repo_id: of the repository.
        facts ([`CardFacts`])
        present: the text of a card that is there already.
        keep_results: whether its `model-index` may be the user's own. Otherwise, and in a card that is written here,
            it is of an earlier push, perhaps of other weights, and goes where no evaluation takes its place.

    Raises:
        CheckpointError: if the recipe or the metadata of the present card cannot be read.
    """
    recipe = _read_recipe(folder)
    try:
        card = ModelCard(present) if present else None
        if card is None or _is_unfilled_template(card.text):
            own, text = {}, f"{BEGIN}\n{END}\n"
        else:
            own, text = card.data.to_dict(), card.text.lstrip("\n")
        if BEGIN in text or not keep_results:
            own.pop("model-index", None)
        metadata = _metadata(own, config, is_adapter, repo_id, facts, recipe)
    except Exception as error:  # of YAML, or of what it says
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{repo_id}: the metadata of its README.md cannot be read: {reason}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        body = _body(folder, config, is_adapter, repo_id, facts, metadata, recipe)
        text = f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"


def _read_recipe(folder: Path) -> dict[str, Any]:
    """What a run recorded, where it did."""
    path = folder / "recipe.json"
    recipe = read_json(path) if path.exists() else {}
    base, datasets = recipe.get("base_model"), recipe.get("datasets")
    if not isinstance(base, str | None):
        raise CheckpointError(f"{path}: base_model ({base!r}) is no name of a model: mend it, or leave it out.")
    names = [datasets] if isinstance(datasets, str) else datasets or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: datasets ({datasets!r}) is no list of names: mend it, or leave it out.")
    return recipe


def _is_unfilled_template(text: str) -> bool:
    """Whether a card is the Hub's template as PEFT or transformers writes it, filled in by nobody."""
    template = ModelCard.from_template(ModelCardData()).text.split()
    return text.partition("### Framework versions")[0].replace(_TRANSFORMERS_SENTENCE, "").split() == template


def _metadata(
    own: dict[str, Any],
    config: dict[str, Any],
    is_adapter: bool,
    repo_id: str,
    facts: CardFacts,
    recipe: dict[str, Any],
) -> ModelCardData:
    """The user's own metadata, completed; what the code decides goes before it, and an evaluation replaces another."""
    recorded = config["base_model_name_or_path"] if is_adapter else recipe.get("base_model")
    base_model = facts.base_model or (recorded if recorded and is_hub_id(recorded) else own.get("base_model"))
    tags = own.get("tags", [])
    written: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": own.get("pipeline_tag", PIPELINE_TAG),
        "tags": list(
            dict.fromkeys(
                [*([tags] if isinstance(tags, str) else tags), *_TAGS, *(["moe-lora"] if is_adapter else [])]
            )
        ),
        "base_model": base_model,
        "base_model_relation": ("adapter" if is_adapter else "finetune") if base_model else None,
        "datasets": list(facts.datasets) or recipe.get("datasets") or own.get("datasets"),
        "license": facts.license or own.get("license"),
    }
    metadata = own | {name: value for name, value in written.items() if value is not None}
    if facts.evaluation:
        metadata.pop("model-index", None)
        metadata |= {"model_name": repo_id.split("/")[-1], "eval_results": _eval_results(facts.evaluation)}
    return ModelCardData(**metadata)


def _eval_results(document: dict[str, Any]) -> list[EvalResult]:
    """One for each figure that is defined, as it stands in the document: 0 to 1."""
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name=_TASK_NAME,
            dataset_type=result["dataset"],
            dataset_name=f"{result['dataset']} ({result['normal']} normal, {result['anomalous']} anomalous images)",
            metric_type=name,
            metric_name=METRICS[name],
            metric_value=value,
        )
        for result in document["datasets"]
        for name, value in result["metrics"].items()
        if value is not None
    ]


def _body(
    folder: Path,
    config: dict[str, Any],
    is_adapter: bool,
    repo_id: str,
    facts: CardFacts,
    metadata: ModelCardData,
    recipe: dict[str, Any],
) -> str:
    kind = (
        f"a PEFT adapter (`{config['peft_type']}`) over {_links(metadata.base_model or [])}, with heads and processor"
        if is_adapter
        else "a complete checkpoint"
    )
    processor = read_json(folder / "processor_config.json")
    sections = [
        f"# {repo_id.split('/')[-1]}",
        f"[MoECLIP]({_PAPER}) routes the patches of a frozen CLIP to mixtures of LoRA experts. Given an image and the "
        "name of what it shows, it tells whether that is damaged, how sure it is, and where, for objects and surfaces "
        f"that it was never trained on. This is {kind}, made with moeclip-hf.",
        "## Use",
        _usage(repo_id, is_adapter),
        "## Model",
        _architecture(config, is_adapter, processor),
        "## Training",
        _training(recipe, metadata),
        "## Results",
        _results(facts.evaluation),
        "## Limits",
        describe_limits(processor),
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(sections)


def _usage(repo_id: str, is_adapter: bool) -> str:
    loading = f"""With the package `moeclip-hf`, which runs no code of this repository:

```bash
moeclip predict photos/ --class-name "metal nut" --model {repo_id}
```"""
    if is_adapter:
        return f"""{loading}

```python
from moeclip_hf.pretrained import load_pretrained

model, processor = load_pretrained("{repo_id}")  # the adapter joined with its CLIP
```

`moeclip_hf.adapters.load_adapter("{repo_id}")` gives the `PeftModel`, for several adapters on one CLIP."""
    return f"""{loading}

```python
import moeclip_hf
from transformers import pipeline

detect = pipeline("{PIPELINE_TASK}", model="{repo_id}")
result = detect("part.png", class_name="metal nut")  # score, is_anomalous, regions, map, heatmap
```

Without the package, `pipeline(..., trust_remote_code=True)` runs the code that this repository carries; look at it
before. It needs what `requirements.txt` names. `handler.py` serves the model from Inference Endpoints. The code is
part of moeclip-hf, Apache-2.0."""


def _architecture(config: dict[str, Any], is_adapter: bool, processor: dict[str, Any]) -> str:
    from moeclip_hf.tuner import MoELoraConfig

    # With what files may leave out.
    config = MoELoraConfig().to_dict() | config if is_adapter else MoECLIPConfig.from_dict(config).to_dict()
    rank = config["r"] if is_adapter else config["lora_rank"]
    rows = [
        ["", "value"],
        ["experts", f"{config['num_experts']} of rank {rank}, {config['num_experts_per_tok']} a token"],
        ["FOFS", "yes" if config["use_fofs"] else "no"],
    ]
    if is_adapter:
        taken = config.get("base_settings") or {}
    else:
        taken = config
        vision = config["vision_config"]
        rows += [
            ["adapted blocks (from 0)", _listed(config["moe_layers"])],
            [
                "vision tower",
                f"{vision['num_hidden_layers']} blocks of width {vision['hidden_size']}, patches of "
                f"{vision['patch_size']} pixels",
            ],
        ]
    rows += [
        [label, _listed(taken[name])]
        for name, label in (("feature_layers", "taps (from 1)"), ("aggregation_sizes", "windows of patch averages"))
        if name in taken
    ]
    size = " x ".join(map(str, MoECLIPImageProcessor.from_dict(processor["image_processor"]).size.values()))
    rows += [["input", f"{size} pixels"], ["domain", str(processor.get("domain", "industrial"))]]
    return markdown_table(rows)


def _training(recipe: dict[str, Any], metadata: ModelCardData) -> str:
    base, selection = recipe.get("base_model"), recipe.get("selection")
    if metadata.base_model:
        base = _links(metadata.base_model)
    elif base:
        base = f"`{base}`, which is not on the Hub"
    parts = [
        f"Its CLIP is that of {base}." if base else "Which CLIP it was made from is not recorded.",
        f"It was trained on {_listed(metadata.datasets)}."
        if metadata.datasets
        else "What it was trained on is not recorded.",
        f"This checkpoint was chosen by: {selection}."
        if selection
        else "By what rule this checkpoint was chosen among others is not recorded.",
    ]
    told = ("base_model", "datasets", "selection")
    rows = [
        [name.replace("_", " "), _listed(value)]
        for name, value in recipe.items()
        if name not in told and value is not None
    ]
    if not rows:
        return " ".join([*parts, "Nor is the recipe."])
    return f"{' '.join(parts)}\n\n{markdown_table([['setting', 'value'], *rows])}"


def _results(document: dict[str, Any] | None) -> str:
    if document is None:
        return "No evaluation was published with this repository."
    rows = [["data set", "images", *METRICS.values()]]
    for result in document["datasets"]:
        rows.append([result["dataset"], f"{result['normal']}/{result['anomalous']}", *_percent(result["metrics"])])
    if len(document["datasets"]) > 1:
        rows.append(["mean", "", *_percent(document["metrics"])])
    settings = document["datasets"][0]["settings"]
    notes = [
        "As `moeclip evaluate` measured these very weights by the benchmark protocol on "
        f"{document['date'][:10]} (moeclip-hf {document['versions']['moeclip-hf']}, "
        f"{_listed(settings['image_size'])} pixels, {settings['dtype']}, {settings['device']}); percent, means over "
        f"classes; images as normal/anomalous; {UNDEFINED} is undefined.",
        markdown_table(rows),
    ]
    parts = [
        result["dataset"]
        for result in document["datasets"]
        if find_benchmark(result["dataset"]) and not result["is_whole_benchmark"]
    ]
    if parts:
        notes.append(f"Not the whole benchmark, and not comparable with published figures: {', '.join(parts)}.")
    return "\n\n".join(notes)


# What the next function writes.
_THRESHOLDS_TOLD = re.compile(
    r"The thresholds (are the default of 0\.5 and were not calibrated|"
    r"\([\d.e-]+ for images, [\d.e-]+ for pixels\) hold for images like those that they were chosen on)"
)


def _describe_thresholds(image: float, pixel: float) -> str:
    if image == pixel == 0.5:
        return "The thresholds are the default of 0.5 and were not calibrated"
    return (
        f"The thresholds ({image:.4g} for images, {pixel:.4g} for pixels) hold for images like those that they were "
        "chosen on"
    )


def renew_thresholds(card: str, image: float, pixel: float) -> str:
    """A card in which [`describe_limits`] told other thresholds, with these."""
    return _THRESHOLDS_TOLD.sub(_describe_thresholds(image, pixel), card)


def describe_limits(processor: Mapping[str, Any]) -> str:
    """What a checkpoint must not be trusted with, as a list in Markdown, given what its processor's file says."""
    thresholds = _describe_thresholds(*(processor.get(name, 0.5) for name in ("image_threshold", "pixel_threshold")))
    return f"""- {thresholds}: set them with `moeclip calibrate` on a few dozen images of your own good parts.
- What counts as damage is what the training data showed as damage. Logical faults (a missing part, a wrong order) and
  kinds of defect unlike any in training may go unseen.
- Images are resized to the input above: defects of less than a patch of it are lost. `moeclip predict --tile auto`
  cuts large images into tiles.
- Nothing here shows that it is fit for decisions about people's health or safety."""


def _links(hub_ids: str | list[str]) -> str:
    hub_ids = [hub_ids] if isinstance(hub_ids, str) else hub_ids
    return ", ".join(f"[{hub_id}](https://huggingface.co/{hub_id})" for hub_id in hub_ids)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _percent(metrics: dict[str, float | None]) -> list[str]:
    return [UNDEFINED if (value := metrics[name]) is None else f"{100 * value:.1f}" for name in METRICS]


__all__ = ["BEGIN", "END", "PIPELINE_TAG", "CardFacts", "compose_card", "read_evaluation", "read_json"]
