"""Benchmarks of EleutherAI's lm-evaluation-harness on our models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatscale.errors import UserError, did_you_mean, first_line
from qatscale.inference.generate import TransformersModel
from qatscale.inference.task_files import check_tasks, render_in_sandbox


@dataclass(frozen=True)
class Score:
    task: str
    metric: str
    filter: str
    """How the model's answer is processed before it is judged; `none` for most tasks."""
    value: float
    error: float | None
    """Standard error over the task's questions; None if not estimated."""
    shots: int | None
    questions: int | None


def open_tasks(tasks: Sequence[str], folder: Path | None) -> Any:
    """The harness's TaskManager, including tasks defined in YAML files in `folder`.

    UserError where the harness or `folder` is missing, for Python code in the folder, and for an unknown task, with the
    nearest name.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401 - it needs accelerate, which lm_eval does not bring
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        problem = f"needs lm-evaluation-harness, and {error.name} is not installed."
        raise UserError("--harness", None, problem, "pip install 'qatscale[harness]'") from None
    if folder is not None and not folder.is_dir():
        raise UserError("--tasks-folder", str(folder), "is not a folder of task definitions (YAML).")
    if not tasks:
        raise UserError("--harness", None, "names no task.", "Give names with commas between them: arc_easy,hellaswag.")
    if folder is not None:
        check_tasks(folder)
    render_in_sandbox()
    manager = TaskManager(include_path=str(folder) if folder else None)
    for task in tasks:
        if task not in manager.all_tasks:
            fix = did_you_mean(task, manager.all_tasks) or "`lm-eval ls tasks` lists them."
            problem = f"is not among the harness's {len(manager.all_tasks):,} tasks and groups."
            raise UserError("--harness", task, problem, fix)
    return manager


def run_harness(
    model: TransformersModel,
    tasks: Sequence[str],
    manager: Any,
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> list[Score]:
    """The scores of a model, first of the tasks, then of groups of them.

    shots: worked examples before a question; None = the task's default. limit: questions of each task. No token
    precedes a text, as in training. UserError where a task's dataset cannot be loaded.
    """
    from jinja2 import TemplateError
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    evaluator.get_git_commit_hash = str  # it asks git, whose "fatal: not a git repository" a user would read
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    judged = HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch, max_length=model.length,
        softmax_dtype="float32", add_bos_token=False,
    )  # fmt: skip
    try:
        results = evaluator.simple_evaluate(
            judged, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit, log_samples=False
        )
    except TemplateError as error:
        problem = f"a template of a task cannot be rendered: {first_line(error)}."
        raise UserError("--harness", ",".join(tasks), problem) from None
    except OSError as error:  # datasets' errors for a hub or a file out of reach
        problem = f"a dataset cannot be loaded: {first_line(error)}"
        fix = "Tasks in --tasks-folder may name local files."
        raise UserError("--harness", ",".join(tasks), problem, fix) from None
    except Exception as error:  # the harness checks nothing of a task: errors of every kind
        problem = f"a task cannot be run: {type(error).__name__}: {first_line(error)}."
        raise UserError("--harness", ",".join(tasks), problem, "Check its definition and its dataset.") from error
    return _scores(results)


def _scores(results: Any) -> list[Score]:
    """From {"results": {task: {"metric,filter": value, "metric_stderr,filter": error, "alias": …}}}."""
    scores = []
    for task, values in (results["results"] | results.get("groups", {})).items():
        for key, value in values.items():
            metric, _, judged = key.partition(",")
            if not judged or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = values.get(f"{metric}_stderr,{judged}")
            questions = results.get("n-samples", {}).get(task, {}).get("effective")
            scores.append(
                Score(
                    task, metric, judged, float(value), error if isinstance(error, float) else None,
                    results.get("n-shot", {}).get(task), questions,
                )
            )  # fmt: skip
    return scores
