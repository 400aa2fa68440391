"""What a study will cost, and how certain a law will be after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qatlaw.information import DETERMINED, Certainty, certainties
from qatlaw.planner_law import PlannerLaw
from qatlaw.run_folders import flatten
from qatlaw.runs import RunRecord, planned_points
from qatlaw.study import Job, Tree, cheapest_tree, longest_paths, simulate
from qatscale.config.ds_config import precision_of, run_ds_config
from qatscale.config.places import without_credentials
from qatscale.config.sizes import stored_weights
from qatscale.data.open import data_here
from qatscale.study.file import TWO_PHASES, read_study
from qatscale.study.grid import Grid, StudyRun, grid


@dataclass(frozen=True)
class Information:
    """How certain a law can become with the runs of a study, if the law holds."""

    law: PlannerLaw
    noise: float
    """Standard deviation of a run's log loss."""
    certainties: Mapping[str, tuple[Certainty | None, Certainty]]
    """By scheme: with the runs that exist, None without any, and with those of the study as well."""
    points: tuple[tuple[float, float, float, float], ...]
    """(parameters, tokens, nominal bits, the law's bits) of the planned runs with two phases, as far as the law
    describes them."""

    def fraction_errors(self, certainty: Certainty) -> dict[float, list[float | None]]:
        """By bit width the standard errors of the optimal fraction at `points`; None where it is not determined."""
        errors: dict[float, list[float | None]] = {}
        for N, D, nominal, B in self.points:
            error = certainty.fraction(N, D, B)
            errors.setdefault(nominal, []).append(error if error <= DETERMINED else None)
        return errors


@dataclass(frozen=True)
class StudyPlan:
    grid: Grid
    tree: Tree
    stay: Mapping[str, set[int]]
    """By run the steps whose checkpoints stay at the end."""
    cost: Forecast
    information: Information | None


def plan_study(
    file: Path, workers: int = 1, law: PlannerLaw | None = None, noise: float = 0.002, known: pd.DataFrame | None = None
) -> StudyPlan:
    """The cheapest tree of a study's runs, its cost, and under `law` the information of its and the `known` runs."""
    study_grid = grid(read_study(file))
    configs = [run.config for run in study_grid.runs]
    for config in {(str(one.data.sources), one.model.vocab_size): one for one in configs}.values():
        data_here(config)  # refuses data that training would refuse
    tree = cheapest_tree([run.route for run in study_grid.runs])
    stay = study_grid.kept({job.route.name: (job.parent, job.start) for job in tree.jobs})
    cost = forecast(tree.jobs, {run.route.name: run.params for run in study_grid.runs}, workers, stay)
    information = None if law is None else _information(study_grid, law, noise, known)
    return StudyPlan(study_grid, tree, stay, cost, information)


def _information(study_grid: Grid, law: PlannerLaw, noise: float, known: pd.DataFrame | None) -> Information:
    bits = law.range["bits"][0] if law.law.form.one_width else None
    planned = planned_points([_record(run) for run in study_grid.runs])
    if law.effective is not None:
        planned = planned.assign(bits=planned["effective_bits"].astype(float))
    points = {
        (
            float(run.params),
            float(run.timeline.tokens),
            float(run.config.qat.bits),
            effective_bits(run) if law.effective else float(run.config.qat.bits),
        )
        for run in study_grid.runs
        if run.config.qat.scheme in TWO_PHASES and bits in (None, run.config.qat.bits)
    }
    by_scheme = certainties(law.law, planned, noise, known, bits)
    return Information(law, noise, by_scheme, tuple(sorted(points)))


def effective_bits(run: StudyRun) -> float:
    """Stored bits per parameter at the end of a run, with scales, embedding and norms."""
    return float(
        stored_weights(run.config.model, run.config.qat, precision_of(run_ds_config(run.config))).effective_bits
    )


def _record(run: StudyRun) -> RunRecord:
    """The record that tracking will keep of a run, without its loss."""
    tokens_qat = run.timeline.qat_steps * run.timeline.tokens_per_step
    final = {
        "n_params": float(run.params),
        "bits": float(run.config.qat.bits),
        "tokens_fp": float(run.timeline.tokens - tokens_qat),
        "tokens_qat": float(tokens_qat),
        "scheme": run.config.qat.scheme,
    }
    return RunRecord(run.config.name, run.config.name, "PLANNED", final, flatten(run.config.model_dump(mode="json")))


CHECKPOINT_BYTES = 12
"""A parameter in a checkpoint: the weight and Adam's two moments, in fp32."""


@dataclass(frozen=True)
class Forecast:
    """Cost of a tree of runs, with all workers equally fast."""

    workers: int
    flops: float
    longest: float
    """FLOPs of the longest chain of runs: no number of workers ends sooner."""
    makespan: float
    """FLOPs of one worker until the last run is done."""
    disk: int
    """Bytes of checkpoints at the fullest moment."""
    disk_at_end: int
    """Bytes of the checkpoints that stay: the final ones, and those of `keep_at`."""


def forecast(
    jobs: Sequence[Job], parameters: Mapping[str, int], workers: int, stay: Mapping[str, set[int]]
) -> Forecast:
    """`jobs`: each after the one it branches from. By job: `parameters` of its model, steps of checkpoints that
    `stay`."""
    slots = {slot.job.route.name: slot for slot in simulate(jobs, workers)}
    sizes = {name: count * CHECKPOINT_BYTES for name, count in parameters.items()}
    needed_until: dict[tuple[str, int], float] = {}  # a checkpoint stays until the last run that branches there is done
    for job in jobs:
        if job.parent in slots and job.start < slots[job.parent].job.route.steps:
            key = (job.parent, job.start)
            needed_until[key] = max(needed_until.get(key, 0.0), slots[job.route.name].end)
    changes = [(slot.end, sizes[name]) for name, slot in slots.items()]
    for (parent, step), end in needed_until.items():
        if step not in stay[parent]:
            changes += [(slots[parent].reaches(step), sizes[parent]), (end, -sizes[parent])]
    changes += [(slots[name].reaches(step), sizes[name]) for name, steps in stay.items() for step in steps]
    held, most = 0, 0
    for _, change in sorted(changes, key=lambda pair: (pair[0], -pair[1])):
        held += change
        most = max(most, held)
    return Forecast(
        workers=workers, flops=sum(job.flops for job in jobs), longest=max(longest_paths(jobs).values()),
        makespan=max(slot.end for slot in slots.values()), disk=most, disk_at_end=held,
    )  # fmt: skip


# --- for programs ---


def as_json(plan: StudyPlan) -> dict[str, Any]:
    """A run is `qatscale train RECIPE OVERRIDES`, and a branch adds `--branch-from`."""
    tree = plan.tree
    content: dict[str, Any] = {
        "study": plan.grid.name,
        "runs": _jobs(plan),
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.grid.left_out],
        "repeated": dict(plan.grid.repeated),
        "warnings": list(plan.grid.warnings),
        "tokens": tree.tokens,
        "tokens_alone": tree.tokens_alone,
        "flops": tree.flops,
        "flops_alone": tree.flops_alone,
        "forecast": asdict(plan.cost),
    }
    if (information := plan.information) is not None:
        schemes = {
            scheme: {"before": _errors(information, before) if before else None, "after": _errors(information, after)}
            for scheme, (before, after) in information.certainties.items()
        }
        law = information.law
        content["information"] = {
            "law": law.source, "synthetic": law.synthetic, "noise": information.noise, "schemes": schemes,
        }  # fmt: skip
    return content


def _jobs(plan: StudyPlan) -> list[dict[str, Any]]:
    runs = {run.route.name: run for run in plan.grid.runs}
    jobs = []
    for job in plan.tree.jobs:
        run = runs[job.route.name]
        parent = runs[job.parent].config.folder if job.parent else None
        kept = [
            step * job.route.tokens_per_step
            for step in sorted({*plan.tree.kept[job.route.name], *plan.stay[job.route.name]})
        ]
        keep_at = [f"checkpoint.keep_at=[{', '.join(map(str, kept))}]"] if kept else []
        jobs.append(
            {
                "name": job.route.name,
                "recipe": run.recipe,
                "overrides": [*map(without_credentials, run.overrides), *keep_at],
                "branch_from": f"{parent}@{job.start}" if parent else None,
                "start": job.start,
                "steps": job.route.steps,
                "new_tokens": job.new_tokens,
                "bits": None if run.config.qat.scheme == "fp" else run.config.qat.bits,
                "effective_bits": None if run.config.qat.scheme == "fp" else effective_bits(run),
            }
        )
    return jobs


def _errors(information: Information, certainty: Certainty) -> dict[str, Any]:
    """Standard errors; null for what is not determined."""
    fractions = information.fraction_errors(certainty)
    return {"parameters": certainty.determined, "fraction": {f"{bits:g}": errors for bits, errors in fractions.items()}}
