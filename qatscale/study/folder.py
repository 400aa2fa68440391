"""The folder of a study, which any number of workers on any hosts share.

::

    study.yaml            the study file as it was laid out
    tree.json             the runs in an order in which they can be trained: parent, steps, cost
    jobs/NAME.yaml        the resolved recipe of each run
    runs/NAME/            run folders
    claims/               who trains what, see `qatscale.supervise.claims`
    logs/                 one log a worker
    results.csv           one row a finished run
    fit-*.json  report/   what the runs say, when all are done

A run is done when its folder holds done.json or when results.csv has its row, so that a run from elsewhere is not
trained again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from qatlaw.results import read_results
from qatlaw.run_files import Number
from qatlaw.study import Job, Piece, Route
from qatscale.config.places import find_moved
from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig, RunName
from qatscale.config.section import Positive
from qatscale.engine.checkpoints.folders import step_folder
from qatscale.errors import UserError
from qatscale.files import Count, is_file, read_checked
from qatscale.supervise.claims import Claims
from qatscale.tracking.run_folder import RunFolder


@dataclass(frozen=True)
class StudyJob:
    """One run of a study, as the folder's tree.json holds it."""

    name: RunName
    parent: str | None
    """The run whose checkpoint it starts from; None: from initial weights."""
    start: Count
    """Optimizer steps done at that checkpoint."""
    steps: Positive
    keep: tuple[Count, ...]
    """Steps before its end at which others branch off."""
    tokens_per_step: Positive
    flops_per_token: Number
    n_params: Count
    processes: Positive
    stay: tuple[Count, ...] = ()
    """Steps whose checkpoints stay when the study is done."""

    @property
    def new_tokens(self) -> int:
        return (self.steps - self.start) * self.tokens_per_step

    def as_tree_job(self) -> Job:
        route = Route(self.name, None, (Piece(None, 0, self.steps),), self.tokens_per_step, self.flops_per_token)
        return Job(route, self.parent, self.start)


class StudyFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_file = path / "study.yaml"
        self.tree_file = path / "tree.json"
        self.runs = path / "runs"
        self.logs = path / "logs"
        self.results = path / "results.csv"
        self.claims = Claims(path / "claims")
        self._tree: tuple[int, dict[str, StudyJob]] = (0, {})
        """(time of change of tree.json, its jobs)."""

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.runs / name)

    def recipe(self, name: str) -> Path:
        return self.path / "jobs" / f"{name}.yaml"

    def config(self, name: str) -> RunConfig:
        """Its recipe in the folder's present place, with data and ds_config that were moved together with the study."""
        recipe = load_run_config(self.recipe(name)).model_dump(mode="json")
        find_moved(recipe, self.runs / name)
        places = {
            "output": self.runs,
            "data.path": recipe["data"]["path"] or "",
            "engine.ds_config": recipe["engine"]["ds_config"],
        }
        return load_run_config(self.recipe(name), [f"{key}={place}" for key, place in places.items()])

    def checkpoint(self, name: str, step: int) -> Path:
        return step_folder(self.runs / name / "checkpoints", step)

    @property
    def jobs(self) -> dict[str, StudyJob]:
        """By name, each after the one it branches from; the same object until the study grows. UserError if tree.json
        is missing or damaged."""
        if not is_file(self.tree_file):
            fix = "Lay it out with `qatscale study run STUDY.yaml`."
            raise UserError("study", str(self.path), "holds no tree.json.", fix)
        changed = self.tree_file.stat().st_mtime_ns
        if changed != self._tree[0]:
            fix = "Remove it, then start `study run` again."
            jobs: dict[str, StudyJob] = {}
            for job in read_checked(self.tree_file, TypeAdapter(list[StudyJob]), "study", fix):
                if job.parent not in (None, *jobs) or job.name in jobs or job.start > job.steps:
                    problem = f"is damaged: {job.name} is listed twice, before its parent, or begins after its end."
                    raise UserError("study", str(self.tree_file), problem, fix)
                jobs[job.name] = job
            self._tree = changed, jobs
        return self._tree[1]

    def recorded(self) -> set[str]:
        """The runs that have a row in results.csv."""
        return {record.name for record in read_results(self.results)} if self.results.exists() else set()
