"""Training: a recipe, one loop for training and fine-tuning, evaluation, recalibration."""

from basis.training.evaluation import Evaluation, evaluate
from basis.training.finetuning import FineTuning, finetune
from basis.training.loop import Result, check_recipe, make_step, seconds_per_step, train
from basis.training.recalibration import Recalibration, recalibrate
from basis.training.recipe import Recipe, TrainingError, TrainingPaused
from basis.training.skipping import Skip

__all__ = [
    "Evaluation",
    "FineTuning",
    "Recalibration",
    "Recipe",
    "Result",
    "Skip",
    "TrainingError",
    "TrainingPaused",
    "check_recipe",
    "evaluate",
    "finetune",
    "make_step",
    "recalibrate",
    "seconds_per_step",
    "train",
]
