"""Kill training at random points, go on with the same command, and compare with runs that nobody killed.

    python analysis/benchmarks/kill_points.py --count 50 --seed 0 --out outputs/kill_points      about 6 minutes

Recipe `debug`, a checkpoint every few steps, each layout by turns. About half the kills are aimed into a save, at a
random time or before a random file operation of it; the others fall into the start, the restart or the steps. Of one
process or of all. After every kill each checkpoint that is found is read whole; at the end of a run its losses, masters
and moments are compared bit for bit. Writes kill_points.json and kill_points.md; exit code 0: nothing was found wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from killing import GRACE, Ended, Measures, Moment, Point, launch, preload

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "ZeRO-1": (2, ["engine.ds_config=zero1_fp32"]),
    "ZeRO-2": (2, ["engine.ds_config=zero2_fp32"]),
    "ZeRO-3": (2, ["engine.ds_config=zero3_fp32"]),
    "tensor-2": (2, ["engine.ds_config=zero1_fp32", "engine.tensor_parallel=2"]),
    "pipeline-2": (2, ["engine.ds_config=zero1_fp32", "engine.pipeline_stages=2"]),
}
"""Name -> (processes, overrides). Whatever a run can be laid out as belongs here."""

STEPS, INTERVAL = 60, 4
MOST_LOST = 2 * INTERVAL
"""Steps: a checkpoint is written while the next interval is trained, and the next one waits for it."""
BASE = [
    f"tokens={STEPS * 256}",
    f"checkpoint.interval={INTERVAL * 256}",
    "checkpoint.keep=2",
    "batch.micro_batch=2",
    "qat.bits=2",
    "evaluation.tokens=1024",
    "tracking.uri=none",
]  # fmt: skip
MOMENTS: dict[Moment, float] = {"starting": 0.1, "training": 0.35, "saving": 0.25, "file operation": 0.3}
"""Shares of the draws. Some of `saving` fall just behind the save, some of `training` into one."""
KILLS_A_RUN = 6


@dataclass
class Kill:
    """One kill and what it left."""

    number: int
    layout: str
    point: str
    inside: bool
    """Inside a save."""
    steps: int
    """Steps done."""
    newest: int
    """Step of the newest checkpoint that was found."""
    found: int
    """Checkpoints found, all of which were read whole."""
    waited: bool
    """A process that was not killed had not ended by itself after GRACE seconds. While starting it waits for the others
    to come, and its launcher is who ends it; later it must not happen."""
    leftovers: list[str]
    """What is hidden beside them, and never taken for a checkpoint."""
    codes: tuple[int, ...]
    wrong: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.steps - self.newest


class Experiment:
    def __init__(self, out: Path, seed: int, layouts: Sequence[str]) -> None:
        self.out, self.layouts = out, layouts
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self.missed = 0
        self.runs: list[dict[str, Any]] = []
        """{"run", "kills", "wrong"} of every run that was killed and brought to its end."""
        self.measures: dict[str, Measures] = {}
        self._launches = 0

    def run(self, count: int, seconds: float) -> None:
        """Draw `count` kills, fewer where the time is over before."""
        self._data()
        end = time.monotonic() + seconds
        for layout in self.layouts:
            self._reference(layout)
        while len(self.kills) < count and time.monotonic() < end:
            fewest = min(self.layouts, key=lambda layout: sum(kill.layout == layout for kill in self.kills))
            self._kill_and_go_on(fewest, count, end)

    def _data(self) -> None:
        from qatscale.data.prepare import prepare

        if not (self.out / "data").exists():
            prepare(["self:600K"], self.out / "data", vocab_size=512, validation_fraction=0.05, workers=1)

    def _overrides(self, name: str, layout: str) -> list[str]:
        where = [f"name={name}", f"output={self.out / 'runs'}", f"data.path={self.out / 'data'}"]
        return [*BASE, *where, *LAYOUTS[layout][1]]

    def _log(self) -> Path:
        self._launches += 1
        return self.out / "launches" / f"{self._launches:04d}"

    def _reference(self, layout: str) -> None:
        """The run that nobody kills; how long its parts take says when to kill the others."""
        ended = launch(self._overrides(f"whole-{layout}", layout), LAYOUTS[layout][0], self._log())
        if any(ended.codes):
            raise RuntimeError(f"{layout}: the run that nobody killed failed:\n{ended.output}")
        self.measures[layout] = ended.measures
        print(f"{layout}: {ended.measures}", flush=True)

    def draw(self, ranks: int) -> Point:
        (moment,) = self.random.choices(list(MOMENTS), list(MOMENTS.values()))
        victim, everyone = self.random.randrange(ranks), self.random.random() < 0.5
        return Point(moment, victim, everyone, self.random.random(), self.random.randint(1, 3))

    def _kill_and_go_on(self, layout: str, count: int, end: float) -> None:
        """One run, killed again and again until it comes to its end."""
        name = f"killed-{len(self.runs)}-{layout}"
        folder, ranks, own = self.out / "runs" / name, LAYOUTS[layout][0], len(self.kills)
        wrong: list[str] = []
        while True:
            enough = len(self.kills) >= min(count, own + KILLS_A_RUN) or time.monotonic() > end
            point = None if enough else self.draw(ranks)
            newest, before = _newest(folder), len(_beginnings(folder))
            ended = launch(self._overrides(name, layout), ranks, self._log(), point, self.measures[layout])
            for began in _beginnings(folder)[before:]:
                if began != newest:
                    wrong.append(f"launch {self._launches} began at step {began}, the newest checkpoint is of {newest}")
            if ended.hung and (point is None or point.moment != "starting"):
                wrong.append(f"launch {self._launches}: a process hung")
            if not ended.killed:
                self.missed += point is not None
                if any(ended.codes):
                    wrong.append(f"launch {self._launches} failed with {ended.codes}")
                    print(ended.output)
                break
            kill = _look(folder, len(self.kills) + 1, layout, str(point), ended)
            self.kills.append(kill)
            print(f"{kill.number:3d} {layout} {point}: {'inside' if kill.inside else 'outside'}, step {kill.steps}, "
                  f"newest {kill.newest} {' '.join(kill.wrong)}", flush=True)  # fmt: skip
        wrong += differences(folder, self.out / "runs" / f"whole-{layout}")
        self.runs.append({"run": name, "kills": len(self.kills) - own, "wrong": wrong})
        print(f"    {name}: {len(self.kills) - own} kills, {wrong or 'as the run that nobody killed'}", flush=True)

    @property
    def wrong(self) -> list[str]:
        found = [f"kill {kill.number}: {what}" for kill in self.kills for what in kill.wrong]
        return found + [f"{run['run']}: {what}" for run in self.runs for what in run["wrong"]]


def _newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    from qatscale.engine.checkpoints.files import list_checkpoints

    found = list_checkpoints(folder / "checkpoints")
    return int(found[-1].name[-8:]) if found else 0


def _beginnings(folder: Path) -> list[int]:
    """The steps at which launches began, of those that came so far as to say it."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["step"] for record in records if record["event"] in ("start", "resume")]


def _look(folder: Path, number: int, layout: str, point: str, ended: Ended) -> Kill:
    """What a kill has left; every checkpoint that can be found is read whole."""
    from qatscale.engine.checkpoints.files import list_checkpoints, verify_files
    from qatscale.engine.checkpoints.reader import CheckpointReader
    from qatscale.errors import UserError

    checkpoints, wrong = folder / "checkpoints", []
    found = list_checkpoints(checkpoints)
    for path in found:
        try:
            reader = CheckpointReader(path)
            verify_files(path, reader.manifest)
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                for name in reader.manifest.parameters:
                    reader.parameter(name, kind)
        except UserError as error:
            wrong.append(f"found but unreadable: {error}")
    hidden = sorted(path.name for path in checkpoints.glob(".*")) if checkpoints.exists() else []
    newest = int(found[-1].name[-8:]) if found else 0
    steps = max(ended.steps, newest)  # killed before its first step
    kill = Kill(number, layout, point, ended.inside, steps, newest, len(found), ended.hung, hidden, ended.codes, wrong)
    if kill.lost > MOST_LOST:
        wrong.append(f"lost {kill.lost} steps, with an interval of {INTERVAL}")
    return kill


def differences(folder: Path, whole: Path) -> list[str]:
    """In what a run is not, bit for bit, the one that nobody killed; empty: in nothing."""
    import torch

    from qatscale.engine.checkpoints.files import list_checkpoints
    from qatscale.engine.checkpoints.reader import CheckpointReader
    from qatscale.tracking.run_folder import RunFolder

    one, other = RunFolder(folder), RunFolder(whole)
    if not one.is_done:
        return ["it did not come to its end"]
    found = []
    for event in ("metrics", "validation"):
        losses = [[(r["step"], r.get("view"), r["loss"]) for r in run.records(event)] for run in (one, other)]
        if losses[0] != losses[1]:
            found.append(f"losses of {event} differ")
    ends = [CheckpointReader(list_checkpoints(run.checkpoints)[-1]) for run in (one, other)]
    manifests = [(end.manifest.step, end.manifest.plugin, end.manifest.parameters) for end in ends]
    if manifests[0] != manifests[1]:
        found.append("manifests differ")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for name in ends[1].manifest.parameters:
            if not torch.equal(ends[0].parameter(name, kind), ends[1].parameter(name, kind)):
                found.append(f"{kind} of {name} differs")
    if hidden := [path.name for path in one.checkpoints.glob(".*")]:
        found.append(f"{hidden} are left")
    return found


def record(experiment: Experiment, seed: int, seconds: float) -> str:
    """The experiment as Markdown."""
    import deepspeed
    import torch

    from qatscale.tracking.environment import cpu_model, git_state

    git = git_state(Path(__file__).parent)
    commit = f"{git['commit'][:7]}{', with uncommitted changes' if git['dirty'] else ''}" if git else "unknown"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}"
    kills = experiment.kills
    lines = [
        f"# {len(kills)} random kills",
        "",
        "| | |",
        "|---|---|",
        f"| date | {time.strftime('%Y-%m-%d')} |",
        f"| command | `python analysis/benchmarks/kill_points.py --count {len(kills)} --seed {seed}` |",
        f"| commit | {commit} |",
        f"| hardware | {os.cpu_count()} cores of {cpu_model()}, no GPU |",
        f"| versions | {versions} |",
        f"| run | recipe `debug`, fp32, 2 bits, {STEPS} steps, switch to QAT half-way, a checkpoint every {INTERVAL} "
        "steps, the last two kept |",
        f"| time | {seconds / 60:.1f} min |",
        "",
        "| layout | kills | inside a save | of one process | runs | most steps lost | mean | resumed wrongly | "
        "found but unreadable | runs that ended otherwise |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for layout in (*experiment.layouts, "all"):
        own = [kill for kill in kills if layout in (kill.layout, "all")]
        runs = [run for run in experiment.runs if layout == "all" or run["run"].endswith(f"-{layout}")]
        if not own:
            continue
        cells = [
            layout if layout == "all" else f"{LAYOUTS[layout][0]} processes, {layout}",
            len(own),
            sum(kill.inside for kill in own),
            sum("rank" in kill.point for kill in own),
            len(runs),
            max(kill.lost for kill in own),
            f"{mean(kill.lost for kill in own):.1f}",
            sum("began at" in what for run in runs for what in run["wrong"]),
            sum("unreadable" in what for kill in own for what in kill.wrong),
            sum(bool(run["wrong"]) for run in runs),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    torn, waited = sum(bool(kill.leftovers) for kill in kills), sum(kill.waited for kill in kills)
    lines += [
        "",
        f"After {torn} kills there was something half-written or half-removed, hidden and never taken for a checkpoint."
        f" {waited} times a process that was still starting waited for the killed one for {GRACE:.0f} s and was ended, "
        f"as launchers do. {experiment.missed} more draws came too late: their run was over.",
        "",
    ]
    lines += ["Wrong:", "", *(f"- {what}" for what in experiment.wrong)] if experiment.wrong else ["Wrong: nothing."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/kill_points"), help="a new folder")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--minutes", type=float, default=30, help="draw no kill after so many")
    options = parser.parse_args()
    if (options.out / "runs").exists():
        parser.error(f"{options.out} holds runs already")
    preload()
    began = time.monotonic()
    experiment = Experiment(options.out.resolve(), options.seed, options.layouts)
    experiment.run(options.count, 60 * options.minutes)
    text = record(experiment, options.seed, time.monotonic() - began)
    found = {"kills": [asdict(kill) for kill in experiment.kills], "runs": experiment.runs, "wrong": experiment.wrong}
    (options.out / "kill_points.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "kill_points.md").write_text(text)
    print(text)
    return 1 if experiment.wrong or len(experiment.kills) < options.count else 0


if __name__ == "__main__":
    sys.exit(main())
