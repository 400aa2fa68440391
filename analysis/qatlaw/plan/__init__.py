"""The planner: each question is a pure function to a dataclass; `qatlaw.cli` asks them from the command line.

    plan_run          N, D, B -> fraction, token counts, switch step, loss, what the 10 % rule wastes
    plan_memory       a memory budget, D -> the best N and B
    compare_widths    N, D -> QAT at each B against full precision
    plan_budget       N, B, FLOPs or GPU-hours -> the compute-optimal fraction
    plan_checkpoint   D_fp spent already, N, B -> the QAT tokens they deserve, and what each buys
    judge_split       what a QAT fraction costs in loss and tokens
    fusion_saving     what fusing QAT with the cooldown gains

Without a law (`qatlaw.planner_law`) the closed form answers what it can.
"""

from qatlaw.plan.budget import Budget, BudgetPlan, BudgetSplit, best_size, compute_optimal, plan_budget
from qatlaw.plan.checkpoint import CheckpointPlan, Purchase, plan_checkpoint
from qatlaw.plan.memory import MemoryPlan, MemoryRow, plan_memory
from qatlaw.plan.run import Prediction, RunPlan, Split, judge_split, plan_run
from qatlaw.plan.shapes import Shape, shapes_within
from qatlaw.plan.waste import FusionSaving, fusion_saving, optimal_loss, tokens_for_loss, wasted_tokens
from qatlaw.plan.widths import Comparison, WidthRow, compare_widths

__all__ = [
    "Budget",
    "BudgetPlan",
    "BudgetSplit",
    "CheckpointPlan",
    "Comparison",
    "FusionSaving",
    "MemoryPlan",
    "MemoryRow",
    "Prediction",
    "Purchase",
    "RunPlan",
    "Shape",
    "Split",
    "WidthRow",
    "best_size",
    "compare_widths",
    "compute_optimal",
    "fusion_saving",
    "judge_split",
    "optimal_loss",
    "plan_budget",
    "plan_checkpoint",
    "plan_memory",
    "plan_run",
    "shapes_within",
    "tokens_for_loss",
    "wasted_tokens",
]
