"""Basis convolutions: train k of a layer's filters, mix the others from them, and learn where that is safe."""

from basis.complexity import CostReport, cost
from basis.conv import BasisConv2d
from basis.storage import load, save
from basis.substitution import Plan, merge, plan_of, substitute
from basis.training import Recipe, Result, evaluate, train

__all__ = [
    "BasisConv2d",
    "CostReport",
    "Plan",
    "Recipe",
    "Result",
    "cost",
    "evaluate",
    "load",
    "merge",
    "plan_of",
    "save",
    "substitute",
    "train",
]
