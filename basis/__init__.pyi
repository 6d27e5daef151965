from basis.bench.tuning import tune as tune, use_modes as use_modes
from basis.costs import CostReport as CostReport, cost as cost
from basis.costs import count_parameters as count_parameters, count_trained as count_trained
from basis.export import export_onnx as export_onnx, export_program as export_program
from basis.inference import fold as fold
from basis.layers.batchnorm import couple as couple, uncouple as uncouple
from basis.layers.coefficients import Coefficients as Coefficients, Form as Form
from basis.layers.conv import BasisConv2d as BasisConv2d
from basis.search.selection import InfeasibleBudget as InfeasibleBudget, select as select
from basis.search.sensitivity import sensitivity as sensitivity
from basis.search.switching import Switch as Switch
from basis.search.table import SensitivityTable as SensitivityTable
from basis.storage import load as load, save as save
from basis.substitution import Plan as Plan, merge as merge, plan_of as plan_of, substitute as substitute
from basis.training.evaluation import Evaluation as Evaluation
from basis.training.finetuning import FineTuning as FineTuning, finetune as finetune
from basis.training.loop import Recipe as Recipe, Result as Result, evaluate as evaluate, train as train
from basis.training.recalibration import Recalibration as Recalibration, recalibrate as recalibrate
from basis.training.skipping import Skip as Skip
