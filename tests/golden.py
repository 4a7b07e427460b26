"""Reads the reference values of tests/fixtures/golden."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moeclip_hf.conversion import convert_released
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel

FOLDER = Path(__file__).parent / "fixtures" / "golden"
CASES = ("default", "no_paa")


@dataclass
class GoldenCase:
    """
    One model with its inputs and the reference outputs.

    `input_ids` (P, 77) and `prompt_groups` (P,) hold the sentences of all classes, in the order of `classes`: class c
    has 6 normal (group 2c) and 10 abnormal ones (group 2c + 1).
    """

    model: MoECLIPModel
    config: dict[str, Any]
    prompts: dict[str, list[list[str]]]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    training: dict[str, torch.Tensor] | None
    input_ids: torch.Tensor
    prompt_groups: torch.Tensor

    @property
    def classes(self) -> list[str]:
        return self.config["classes"]

    def class_index(self, class_names: list[str]) -> torch.Tensor:
        return torch.tensor([self.classes.index(name) for name in class_names])


def golden_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a case's `config.json` tells that the shapes of its weights do not."""
    vision, text = config["vision"], config["text"]
    return {
        "vision_config": {"num_attention_heads": vision["width"] // vision["head_width"]},
        "text_config": {"num_attention_heads": text["heads"]},
        "moe_layers": config["moe_layers"],
        "feature_layers": config["levels"],
        "num_experts_per_tok": config["top_k"],
        "lora_alpha": config["lora_alpha"],
        "residual_weight": config["image_adapt_weight"],
        "aggregation_sizes": [1, 3, 5] if config["use_paa"] else [1],
    }


def golden_files(name: str) -> tuple[Path, Path]:
    """The adapter and the CLIP of a case."""
    return FOLDER / name / "moe_last.pth", FOLDER / name / "clip_openai.safetensors"


def golden_case(name: str) -> GoldenCase:
    """Load a case; the model is a fresh one, in eval mode."""
    folder = FOLDER / name
    config = json.loads((folder / "config.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    input_ids = [inputs[f"input_ids.{c}.{state}"] for c in config["classes"] for state in ("normal", "abnormal")]
    groups = [torch.full((len(ids),), group) for group, ids in enumerate(input_ids)]
    training = folder / "training.safetensors"
    return GoldenCase(
        model=convert_released(*golden_files(name), **golden_settings(config)).eval(),
        config=config,
        prompts=json.loads((folder / "prompts.json").read_text()),
        inputs=inputs,
        outputs=load_file(folder / "outputs.safetensors"),
        training=load_file(training) if training.exists() else None,
        input_ids=torch.cat(input_ids),
        prompt_groups=torch.cat(groups),
    )


def golden_position_embeddings() -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(new side of the grid, embeddings, expected embeddings) of each case."""
    tensors = load_file(FOLDER / "position_embeddings.safetensors")
    names = sorted(key.removesuffix(".input") for key in tensors if key.endswith(".input"))
    return [(int(name.split(".")[1]), tensors[f"{name}.input"], tensors[f"{name}.expected"]) for name in names]
