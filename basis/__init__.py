"""Basis convolutions: train k of a layer's filters, mix the others from them, and learn where that is safe."""

from basis.analysis import sensitivity
from basis.coefficients import Coefficients, Form
from basis.complexity import CostReport, cost, count_parameters, count_trained
from basis.conv import BasisConv2d
from basis.evaluation import Evaluation
from basis.finetuning import FineTuning, finetune
from basis.inference import fold
from basis.norm import couple, uncouple
from basis.repair import Recalibration, recalibrate
from basis.selection import InfeasibleBudget, select
from basis.storage import load, save
from basis.substitution import Plan, merge, plan_of, substitute
from basis.table import SensitivityTable
from basis.training import Recipe, Result, evaluate, train
from basis.tuning import tune, use_modes

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
    "cost",
    "count_parameters",
    "count_trained",
    "couple",
    "evaluate",
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
