"""What is written into a study's folder: its tree and recipes, and the rows of finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, replace
from pathlib import Path

from qatlaw.measurement import WITHOUT_EFFECT
from qatlaw.results import read_results, write_results
from qatlaw.run_folders import RunRecord, run_record
from qatlaw.study import Job, Offer, cheapest_tree
from qatlaw.text import listed, plural
from qatscale.config.places import without_credentials
from qatscale.config.recipe import config_differences, recorded_yaml
from qatscale.config.schema import RunConfig
from qatscale.engine.checkpoints.folders import list_checkpoints, step_of
from qatscale.errors import UserError
from qatscale.files import locked, write_atomic, write_json
from qatscale.study.file import read_study
from qatscale.study.folder import StudyFolder, StudyJob
from qatscale.study.grid import Grid, StudyRun, grid


def lay_out(study_file: Path, folder: StudyFolder) -> tuple[str, ...]:
    """Write or extend the tree of a study; returns notes for the user.

    Runs that were begun stay as they are, and a study that grows branches from the checkpoints they left. Those that
    failed before they began are tried again. UserError where a run that was begun would become another one, and where
    workers are training.
    """
    with locked(folder.path / ".layout", wait=60):
        study = read_study(study_file)
        content = study_file.read_bytes()
        for address in study.addresses:
            content = content.replace(address.encode(), without_credentials(address).encode())
        if folder.tree_file.exists() and folder.study_file.exists() and folder.study_file.read_bytes() == content:
            return ()
        cells = grid(study)
        old = folder.jobs if folder.tree_file.exists() else {}
        if old and (running := folder.claims.held(print)):
            problem = f"{plural(len(running), 'run')} in training, and the study file has changed."
            raise UserError("study", str(folder.path), problem, "Stop the workers (SIGTERM), then start it again.")
        recorded = folder.recorded()
        begun = {name for name in old if name in recorded or folder.run(name).run_file.exists()}
        runs = {run.route.name: run for run in cells.runs}
        configs = {name: _absolute(run.config) for name, run in runs.items()}
        again = sorted(begun & runs.keys())
        for name in again:
            _refuse_another_run(folder, name, configs[name])
        offered = {name: _offered_steps(folder, old[name]) for name in begun}
        offers = [Offer(runs[name].route, offered[name]) for name in again]
        done = recorded & runs.keys() - begun  # trained elsewhere: nothing branches from them here
        kept = _needed(old, again, begun)
        jobs = [old[name] for name in old if name in kept]
        tree = cheapest_tree([run.route for name, run in runs.items() if name not in begun | done], offers)
        jobs += [_job(runs[job.route.name], job, tree.kept[job.route.name]) for job in tree.jobs]
        jobs += [_job(runs[name], Job(runs[name].route, None, 0), ()) for name in sorted(done)]
        jobs, lost = _with_stay(jobs, cells, offered, done)
        for job in jobs:
            if job.name in configs and job.name not in begun:
                steps = sorted({*job.keep, *job.stay})
                _write_recipe(folder, configs[job.name], [step * job.tokens_per_step for step in steps])
        for name, attempt in folder.claims.attempts().items():
            if attempt.state == "failed" and name not in begun:
                folder.claims.release(attempt, "the study has changed")
        write_atomic(folder.study_file, content)
        write_json(folder.tree_file, [asdict(job) for job in jobs])
    notes = [f"left out: {name}: {why}" for name, why in cells.left_out]
    if cells.repeated:
        notes.append(
            f"trained once, under their first names: {listed([f'{name} is {same}' for name, same in cells.repeated])}"
        )
    if lost:
        notes.append(f"trained before keep_at named them, so not on disk: {listed(lost)}")
    asked = {name: set(folder.config(name).evaluation.ptq_bits) for name in again}
    if unasked := [name for name, then in asked.items() if set(configs[name].evaluation.ptq_bits) - then]:
        notes.append(f"trained before the study had all its bit widths, so no PTQ at the new ones: {listed(unasked)}")
    if dropped := [name for name in old if name in begun and name not in kept]:
        notes.append(f"no longer in the study, their folders stay: {listed(dropped)}")
    return (*notes, *cells.warnings)


def _with_stay(
    jobs: list[StudyJob], cells: Grid, offered: Mapping[str, tuple[int, ...]], done: Set[str]
) -> tuple[list[StudyJob], list[str]]:
    """The jobs with the checkpoints that `keep_at` names, each at the job that trains it, and what is past.

    offered: by begun run the steps whose checkpoints exist or will. done: runs trained elsewhere.
    """
    staying, lost = [], []
    for name, wanted in cells.kept({job.name: (job.parent, job.start) for job in jobs}).items():
        possible = () if name in done else offered.get(name, wanted)
        staying.append(tuple(sorted(wanted & {*possible})))
        lost += [f"{name}@{step}" for step in sorted(wanted - {*possible})]
    return [replace(job, stay=stay) for job, stay in zip(jobs, staying, strict=True)], lost


def _needed(jobs: Mapping[str, StudyJob], names: Iterable[str], begun: Set[str]) -> set[str]:
    """These runs, and those begun from which they branch. `jobs`: each after the one it branches from."""
    needed = set(names)
    for name in reversed(list(jobs)):
        parent = jobs[name].parent
        if name in needed and parent is not None and parent in begun:
            needed.add(parent)
    return needed


def _job(run: StudyRun, job: Job, kept: Iterable[int]) -> StudyJob:
    route = job.route
    return StudyJob(
        route.name, job.parent, job.start, route.steps, tuple(kept),
        route.tokens_per_step, route.flops_per_token, run.params, run.processes,
    )  # fmt: skip


def _offered_steps(folder: StudyFolder, job: StudyJob) -> tuple[int, ...]:
    """Steps of the checkpoints of a run that was begun: those on disk that stay, and those it will still write."""
    run = folder.run(job.name)
    if not run.run_file.exists():
        return ()  # trained elsewhere
    on_disk = {step_of(path) for path in list_checkpoints(run.checkpoints)}
    if run.is_done:
        return tuple(sorted(on_disk))
    reached = max(on_disk, default=0)
    return tuple(step for step in (*job.keep, *job.stay, job.steps) if step in on_disk or step > reached)


def _absolute(config: RunConfig) -> RunConfig:
    """The configuration with an absolute data path, since workers start in other folders."""
    path = config.data.path
    return config if path is None else config.model_copy(
        update={"data": config.data.model_copy(update={"path": path.resolve()})}
    )  # fmt: skip


def _write_recipe(folder: StudyFolder, config: RunConfig, kept: list[int]) -> None:
    checkpoint = config.checkpoint.model_copy(update={"keep_at": kept})
    recorded = config.model_copy(update={"checkpoint": checkpoint, "output": folder.runs})
    path = folder.recipe(config.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, recorded_yaml(recorded).encode())


def _refuse_another_run(folder: StudyFolder, name: str, config: RunConfig) -> None:
    """UserError where a run that was begun would get another configuration. `init`: it keeps its initial weights."""
    differences = config_differences(folder.config(name), config)
    if first := next((one for one in differences if not one.key.startswith((*WITHOUT_EFFECT, "init"))), None):
        problem = f"{name} was trained with {first.key} = {first.old!r}; the study now says {first.new!r}."
        raise UserError("study", str(folder.path), problem, "Use another folder, or give the sizes other names.")


def record(folder: StudyFolder, *names: str) -> None:
    """Add the rows of finished runs, in the order of the tree. Rows that exist stay as they are."""
    record_rows(folder, [run_record(folder.run(name).path) for name in names])


def record_rows(folder: StudyFolder, added: Iterable[RunRecord]) -> None:
    """Add rows. Rows that exist stay as they are."""
    with locked(folder.path / ".results", wait=60):
        rows = {row.name: row for row in (read_results(folder.results) if folder.results.exists() else [])}
        for row in added:
            rows.setdefault(row.name, row)
        order = {name: i for i, name in enumerate(folder.jobs)}
        write_results(folder.results, sorted(rows.values(), key=lambda row: order.get(row.name, len(order))))


def unrecorded(folder: StudyFolder) -> list[str]:
    """Finished runs without a row, whose worker ended before it wrote one."""
    recorded = folder.recorded()
    return [name for name in folder.jobs if name not in recorded and folder.run(name).is_done]
