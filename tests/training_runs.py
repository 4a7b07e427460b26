"""Small training runs: data, models and trainers that tests share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_models import tiny_config
from transformers import CLIPConfig, CLIPModel

from moeclip_hf.modeling.image_processing_moeclip import MoECLIPImageProcessor
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor
from moeclip_hf.training import MoECLIPTrainer, Recipe, TrainingSamples, get_recipe, start_model, training_arguments


def write_plain_clip(folder: Path, tokenizer: Any) -> Path:
    """A random CLIP of small size, with its tokenizer and no image processor."""
    torch.manual_seed(0)
    config = tiny_config()
    text = config.text_config.to_dict() | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 20,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = config.vision_config.to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_folder(root: Path, images_a_state: int = 6) -> Path:
    """Grey noise in two classes; what is anomalous is a bright square, marked in its mask."""
    rng = np.random.default_rng(0)
    for name in ("nut", "wood"):
        for index in range(images_a_state):
            for state in ("normal", "abnormal"):
                pixels = rng.integers(60, 120, (20, 20, 3), dtype=np.uint8)
                mask = np.zeros((20, 20), dtype=np.uint8)
                if state == "abnormal":
                    row, column = rng.integers(0, 12, 2)
                    mask[row : row + 8, column : column + 8] = 255
                    pixels[mask > 0] = 250
                for part, picture in ((state, pixels), ("masks", mask)):
                    if part != "masks" or state == "abnormal":
                        path = root / name / part / f"{index}.png"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(picture).save(path)
    return root


def tiny_trainer(clip: Path, rows: Any, output_dir: Path, recipe: Recipe | None = None, **settings: Any):
    """A trainer over the CLIP in a folder, on the CPU, that logs every step."""
    recipe = recipe or get_recipe("paper", batch_size=4, num_epochs=2)
    model, processor = start_model(clip, recipe, seed=settings.get("seed", 0))
    defaults = {"use_cpu": True, "logging_steps": 1, "dataloader_num_workers": 0, "disable_tqdm": True}
    args = training_arguments(output_dir, recipe, **(defaults | settings))
    return MoECLIPTrainer(model, args, TrainingSamples(rows, processor, recipe.augment, args.seed), processor, recipe)


def interrupt_second_step(monkeypatch: Any) -> list[int]:
    """Cut the next training off in its second step, once; the steps that are taken from now on, as they are taken."""
    steps: list[int] = []
    training_step = MoECLIPTrainer.training_step

    def step(trainer: MoECLIPTrainer, *args: Any) -> Any:
        steps.append(trainer.state.global_step)
        if steps == [0, 1]:
            raise KeyboardInterrupt
        return training_step(trainer, *args)

    monkeypatch.setattr(MoECLIPTrainer, "training_step", step)
    return steps


def logged(trainer: MoECLIPTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def bare_processor(tokenizer: Any) -> MoECLIPProcessor:
    return MoECLIPProcessor(MoECLIPImageProcessor(size={"height": 20, "width": 20}, patch_size=4), tokenizer)
