"""Training of MoECLIP: recipes, samples, and a trainer on `transformers.Trainer`; docs/training.md tells why."""

from moeclip_hf.training.recipes import RECIPES, Recipe, get_recipe
from moeclip_hf.training.run import start_model, train, training_arguments
from moeclip_hf.training.samples import TrainingSamples
from moeclip_hf.training.trainer import MoECLIPTrainer

__all__ = [
    "RECIPES",
    "MoECLIPTrainer",
    "Recipe",
    "TrainingSamples",
    "get_recipe",
    "start_model",
    "train",
    "training_arguments",
]
