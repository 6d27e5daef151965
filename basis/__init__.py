"""Basis convolutions: train k of a layer's filters, mix the others from them, and learn where that is safe."""

from basis.bench.tuning import tune, use_modes
from basis.costs import CostReport, cost, count_parameters, count_trained
from basis.export import export_onnx, export_program
from basis.inference import fold
from basis.layers.batchnorm import couple, uncouple
from basis.layers.coefficients import Coefficients, Form
from basis.layers.conv import BasisConv2d
from basis.search.selection import InfeasibleBudget, select
from basis.search.sensitivity import sensitivity
from basis.search.switching import Switch
from basis.search.table import SensitivityTable
from basis.storage import load, save
from basis.substitution import Plan, merge, plan_of, substitute
from basis.training.evaluation import Evaluation
from basis.training.finetuning import FineTuning, finetune
from basis.training.loop import Recipe, Result, evaluate, train
from basis.training.recalibration import Recalibration, recalibrate
from basis.training.skipping import Skip

__all__ = [
    "BasisConv2d",
    "Coefficients",
    "CostReport",
    "Evaluation",
    "FineTuning",
    "Form",
    "InfeasibleBudget",
    "Plan",
    "Recalibration",
    "Recipe",
    "Result",
    "SensitivityTable",
    "Skip",
    "Switch",
    "cost",
    "count_parameters",
    "count_trained",
    "couple",
    "evaluate",
    "export_onnx",
    "export_program",
    "finetune",
    "fold",
    "load",
    "merge",
    "plan_of",
    "recalibrate",
    "save",
    "select",
    "sensitivity",
    "substitute",
    "train",
    "tune",
    "uncouple",
    "use_modes",
]
