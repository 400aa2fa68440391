"""`qatscale study run`, `work` and `status`: train a study, join it as a worker, watch it."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatlaw.errors import InputError
from qatlaw.text import plural
from qatlaw.text_table import TextTable
from qatscale.cli.terminal import Json, console, say
from qatscale.errors import EXIT_FAILED, UserError, exit_code

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qatscale.study.folder import StudyFolder
    from qatscale.study.state import StudyState

REFRESH = 2.0
"""Seconds between two looks at a study."""
_MOST_ROWS = 12
Folder = Annotated[Path, typer.Argument(help="The folder of a study.")]


def run(
    study: Annotated[Path, typer.Argument(help="A study file, or the folder of a study that was begun.")],
    out: Annotated[Path | None, typer.Option(help="The study's folder. [default: studies/NAME]")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, max=1000, help="Workers on this machine; 0: only other hosts train. [default: one per GPU or core]"
        ),
    ] = None,
    workers_per_gpu: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Workers that share a GPU, for models that do not fill one. [default: 1]"),
    ] = None,
    retry: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="Train a failed run again; all: every failed run.")
    ] = None,
) -> None:
    """Train all runs of a study, then fit the law and write the report.

    You can stop it and start it again at any time, also after a full disk, and the study file may grow: finished runs
    stay. Other hosts that share the folder take part with `qatscale study work FOLDER`.
    """
    from qatscale.study.lay_out import lay_out, record, unrecorded
    from qatscale.study.run import LocalWorkers, default_workers
    from qatscale.study.state import StudyState
    from qatscale.supervise.signals import catch

    file, folder = _places(study, out)
    for note in lay_out(file, folder):
        say(f"note: {note}")
    state = StudyState(folder)
    state.refresh()
    for claim in [one for one in state.attempts.values() if one.damage and one.state == "running"]:
        print(f"note: {claim.path} {claim.damage}; its run starts when no heartbeat has come for two minutes")
    _retry(folder, state, retry or [])
    count = default_workers(folder, workers_per_gpu) if workers is None else workers
    print(f"study folder: {folder.path}; {plural(count, 'worker')} here, logs in {folder.logs}")
    stopped: list[int] = []
    before = catch(lambda number, _: stopped.append(number))
    with LocalWorkers(folder, count, workers_per_gpu) as local, _display(state) as show:
        while not stopped:
            state.refresh()
            show()
            if not (local.restart_dead() if count else state.may_go_on):
                break
            time.sleep(REFRESH)
    for number, handler in before.items():
        signal.signal(number, handler)
    state.refresh()
    record(folder, *unrecorded(folder))
    counts = state.counts()
    if stopped:
        done = f"{counts['done']} of {plural(len(state.states), 'run')} done"
        print(f"stopped by {signal.Signals(stopped[0]).name}: {done}; the same command continues from there")
        sys.exit(exit_code(stopped[0]))
    for name, one in state.states.items():
        if one.reason and one.state in ("failed", "ready"):
            say(f"{one.state.replace('ready', 'stopped')}: {name}: {one.reason}")
    for reason, names in state.refusals().items():
        say(f"warning: MLflow did not take {plural(len(names), 'run')}, which trained without it. {reason}")
    if counts["blocked"]:
        blocked = plural(counts["blocked"], "run")
        print(f"blocked: {blocked} that branch from them. `qatscale study run {folder.path} --retry all`")
    _conclude(folder)
    if counts["done"] < len(state.states):
        sys.exit(EXIT_FAILED)


def work(
    folder: Annotated[Path, typer.Argument(help="The folder of a study, laid out by `qatscale study run`.")],
) -> None:
    """Train runs of a study in this process, one after the other, until none is left.

    Slurm or a person starts it on any host that shares the folder.
    """
    from qatscale.study.folder import StudyFolder
    from qatscale.study.worker import Worker

    sys.exit(Worker(StudyFolder(folder)).work())


def status(folder: Folder, as_json: Json = False) -> None:
    """Print which runs are done, running, failed or blocked, and the time left; live on a terminal, until Ctrl-C."""
    from qatscale.study.folder import StudyFolder
    from qatscale.study.state import StudyState

    state = StudyState(StudyFolder(folder))
    state.refresh()
    if as_json:
        print(json.dumps(_plain_status(state), indent=2))
        return
    if not console().is_terminal:
        console().print(_status(state))
        return
    with _display(state) as show:
        try:
            while state.may_go_on:
                show()
                time.sleep(REFRESH)
                state.refresh()
        except KeyboardInterrupt:
            return
        show()


def average(folder: Folder) -> None:
    """Average and evaluate the weights of runs that differ in the cooldown's data alone, and of uncooled runs' ends.

    Each average is a row of results.csv and a run's folder in averages/. The report is written anew, with bias and
    variance of the cooldown. An average that has its row is not made again.
    """
    from qatscale.study.average import average_study
    from qatscale.study.folder import StudyFolder

    found = StudyFolder(folder)
    made = average_study(found)
    print(f"{plural(made, 'new average')} in {found.results}")
    _conclude(found)


def _places(study: Path, out: Path | None) -> tuple[Path, StudyFolder]:
    """The study's file and folder."""
    from qatscale.study.file import read_study
    from qatscale.study.folder import StudyFolder

    if study.is_dir():
        if out is not None:
            raise UserError("--out", str(out), f"{study} is the folder already.", "Leave it out.")
        folder = StudyFolder(study)
        if not folder.study_file.is_file():
            raise UserError("study", str(study), "holds no study.yaml.", "Give a study file, or a study's folder.")
        return folder.study_file, folder
    return study, StudyFolder(out or Path("studies") / read_study(study).name)


def _retry(folder: StudyFolder, state: StudyState, names: list[str]) -> None:
    """Let workers try failed runs again."""
    failed = list(state.failures())
    for name in names:
        if name != "all" and name not in failed:
            known = f"Failed: {', '.join(failed)}." if failed else "No run has failed."
            raise UserError("--retry", name, "has not failed.", known)
    for name in failed if "all" in names else names:
        folder.claims.release(state.attempts[name], "to be tried again")


def _conclude(folder: StudyFolder) -> None:
    """Fit a law to each scheme and write the report; print why where one is not possible yet."""
    from qatlaw.results import read_results
    from qatscale.cli.fit import fit, report

    done = read_results(folder.results) if folder.results.exists() else []
    if not done:
        print("no law and no report: no run is done")
        return
    schemes = {record.final.get("scheme", "") for record in done} & {"sequential", "fused"}
    for scheme in sorted(schemes):
        try:
            fit(table=folder.results, scheme=scheme, out=folder.path / f"fit-{scheme}.json")
        except InputError as problem:
            say(f"no law of {scheme} runs: {problem}")
    try:
        report(table=folder.results, out=folder.path / "report")
    except InputError as problem:
        say(f"no report: {problem}")


# --- printing ---


@contextmanager
def _display(state: StudyState) -> Iterator[Callable[[], None]]:
    """It yields a function that shows the state: in a live table on a terminal, elsewhere as a line, whenever the
    number of finished runs has changed."""
    from rich.live import Live

    if console().is_terminal:
        with Live(console=console(), auto_refresh=False) as live:
            yield lambda: live.update(_status(state), refresh=True)
        return
    shown: list[int] = []

    def show() -> None:
        counts = state.counts()
        ended = [counts["done"], counts["failed"], counts["blocked"]]
        if ended != shown:
            shown[:] = ended
            print(_headline(state), flush=True)

    yield show


def _headline(state: StudyState) -> str:
    from qatscale.config.amounts import format_amount
    from qatscale.study.state import progress
    from qatscale.train.console import format_duration

    counts, now = state.counts(), progress(state)
    parts = [f"{counts['done']} of {plural(len(state.states), 'run')} done"]
    parts += [f"{counts[one]} {one}" for one in ("running", "ready", "waiting", "failed", "blocked") if counts[one]]
    parts.append(f"{format_amount(now.tokens_done)} of {format_amount(now.tokens)} tokens")
    if now.seconds_left is not None:
        parts.append(f"about {format_duration(now.seconds_left)} left")
    return ", ".join(parts)


def _status(state: StudyState) -> RenderableType:
    from rich.console import Group

    rows: list[RenderableType] = [_headline(state)]
    running = [name for name, one in state.states.items() if one.state == "running"]
    if running:
        table = TextTable(("running", "worker", "step", "%"), words=("running", "worker"), drop=("worker",))
        for name in running[:_MOST_ROWS]:
            job, step = state.folder.jobs[name], state.step(name)
            share = (step - job.start) / max(1, job.steps - job.start)
            table.add_row(name, state.attempts[name].worker, f"{step:,}/{job.steps:,}", f"{share:.0%}")
        rows.append(table)
        if len(running) > _MOST_ROWS:
            rows.append(f"and {len(running) - _MOST_ROWS} more")
    if failures := state.failures():
        table = TextTable(("failed", "why"), words=("failed", "why"))
        for failure in list(failures.items())[:_MOST_ROWS]:
            table.add_row(*failure)
        rows.append(table)
    return Group(*rows)


def _plain_status(state: StudyState) -> dict[str, object]:
    from qatscale.study.state import progress

    return {
        "counts": state.counts(),
        **asdict(progress(state)),
        "runs": [
            {"name": name, "state": one.state, "attempts": one.attempt, "step": state.step(name),
             "steps": state.folder.jobs[name].steps, "reason": one.reason}
            for name, one in state.states.items()
        ],
    }  # fmt: skip
