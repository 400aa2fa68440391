"""Other people's benchmarks on our models: EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatscale.errors import UserError, did_you_mean
from qatscale.inference.transformers_model import TransformersModel


@dataclass(frozen=True)
class Score:
    task: str
    metric: str
    filter: str
    """What was done to the model's answer before it was judged; `none` for most tasks."""
    value: float
    error: float | None
    """Standard error over the task's questions, by bootstrap where there is no formula; None where there is neither."""
    shots: int | None
    questions: int | None


def check_harness() -> None:
    """UserError where the harness is not installed."""
    try:
        import lm_eval.models.huggingface  # noqa: F401 - it wants accelerate, which lm_eval does not bring
    except ImportError:
        told = "needs lm-evaluation-harness, which is not installed."
        raise UserError("--harness", None, told, "pip install 'qatscale[harness]'") from None


def open_tasks(tasks: Sequence[str], folder: Path | None) -> Any:
    """The harness's TaskManager that knows `tasks`, also those defined in YAML files in `folder`.

    UserError for a task that is not known, with the name that was probably meant.
    """
    check_harness()
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise UserError("--tasks-folder", str(folder), "a folder with task definitions (YAML).")
    if not tasks:
        raise UserError("--harness", None, "names tasks, with commas between them: arc_easy,hellaswag.")
    manager = TaskManager(include_path=str(folder) if folder else None)
    for task in tasks:
        if task not in manager.all_tasks:
            do = did_you_mean(task, manager.all_tasks) or "`lm-eval ls tasks` lists them."
            raise UserError("--harness", task, f"one of the harness's {len(manager.all_tasks):,} tasks and groups.", do)
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
    """The scores of a model, those of groups after those of their tasks.

    shots: worked examples in front of a question; None: the task's own number. limit: questions of each task. Texts are
    read without a token in front, as in training. UserError where a task's data set cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    judged = HFLM(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        batch_size=batch,
        max_length=model.length,
        softmax_dtype="float32",
        add_bos_token=False,
    )
    try:
        found = simple_evaluate(
            judged, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit, log_samples=False
        )
    except (OSError, ConnectionError) as error:  # datasets' errors for a hub or a file out of reach are among these
        told = f"a data set could not be had: {str(error).splitlines()[0]}"
        raise UserError("--harness", ",".join(tasks), told, "Tasks in --tasks-folder may name local files.") from None
    return _scores(found)


def _scores(found: Any) -> list[Score]:
    """From {"results": {task: {"metric,filter": value, "metric_stderr,filter": error, "alias": …}}}."""
    scores = []
    for task, results in (found["results"] | found.get("groups", {})).items():
        for key, value in results.items():
            metric, _, judged = key.partition(",")
            if not judged or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = results.get(f"{metric}_stderr,{judged}")
            questions = found.get("n-samples", {}).get(task, {}).get("effective")
            scores.append(
                Score(
                    task, metric, judged, float(value), error if isinstance(error, float) else None,
                    found.get("n-shot", {}).get(task), questions,
                )
            )  # fmt: skip
    return scores
