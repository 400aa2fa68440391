"""Does the main job work on this machine? Everything that has to, through the real launcher, in one command.

    python analysis/benchmarks/gpu/main_job.py --device cuda --out DIR
    python analysis/benchmarks/gpu/main_job.py --device cpu --out DIR        recipe `debug`: a test of this script

Full precision, switch and QAT under ZeRO 1, 2, 3, in fp32 and bf16, at 2 and 4 bits; SIGKILL, SIGTERM, resume, resume
under another stage; evaluation in three views; speed and memory of both phases. Writes DIR/main_job.json and
DIR/main_job.md; no check stops another; exit code 0: all passed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from record import FailedCheckError, Record, about_here, require

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.append(str(HERE.parent))  # kill_points

PARTS = ("compare", "stop", "speed")
STAGES, PRECISIONS, BITS = (1, 2, 3), ("fp32", "bf16"), (2, 4)
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative, of losses under other stages, or resumed without deterministic algorithms."""
BF16_AGAINST_FP32 = 2e-2
KILL, STOP = 0.35, 0.65
"""Of the steps: before and after the switch, which comes half-way."""


@dataclass(frozen=True)
class Size:
    """What is trained on a device."""

    recipe: str
    vocabulary: int
    steps: int
    small: tuple[str, ...]
    """Overrides of the runs that are compared."""
    measured_steps: int
    measured: tuple[str, ...]
    """Of the runs whose speed and memory are measured, one at a time."""
    tokens_per_step: tuple[int, int]
    """Of the two kinds."""
    jobs: int
    """Runs that are compared at a time."""


SIZES = {
    "cpu": Size("debug", 512, 40, ("batch.micro_batch=2",), 40, (), (256, 256), 2),
    "cuda": Size(
        "86m", 8192, 60,
        # 11M parameters: the checkpoints of 25 runs are 15 GB, and fp32 is done in seconds
        ("model.vocab_size=8192", "model.hidden_size=384", "model.layers=4", "model.heads=6",
         "model.intermediate_size=1152", "data.sequence_length=512", "batch.sequences=16", "batch.micro_batch=8"),
        200,
        ("model.vocab_size=8192", "data.sequence_length=2048", "batch.sequences=16", "batch.micro_batch=16"),
        (8192, 32768), 4,
    ),
}  # fmt: skip


class Launched:
    """A training run through DeepSpeed's launcher, on one process."""

    def __init__(self, job: Job, name: str, ds_config: str, bits: int, kind: str) -> None:
        self.job, self.name, self.kind = job, name, kind
        self.folder = job.work / "runs" / name
        size = job.size
        steps = size.measured_steps if kind == "measured" else size.steps
        self.steps, tokens = steps, size.tokens_per_step[kind == "measured"]
        self.arguments = [
            size.recipe, *(size.measured if kind == "measured" else size.small), f"name={name}",
            f"output={job.work / 'runs'}", f"data.path={job.work / 'data'}", f"engine.ds_config={ds_config}",
            f"tokens={steps * tokens}", f"qat.bits={bits}", "qat.scheme=fused", "qat.fraction=0.5",
            f"schedule.warmup_tokens={steps * tokens // 10}", "schedule.cooldown_fraction=0.2",
            f"checkpoint.interval={steps // 6 * tokens if name.startswith('killed') else 'null'}", "checkpoint.keep=1",
            "optimizer.learning_rate=3e-4", "evaluation.interval=null", f"evaluation.tokens={8 * tokens}",
            f"evaluation.ptq_bits=[{bits}]", "log_interval=1", "tracking.uri=none",
        ]  # fmt: skip
        self.output = job.work / f"{name}.log"
        self._lock = threading.Lock()

    def start(self) -> subprocess.Popen[bytes]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        programs = Path(sys.executable).parent  # the launcher starts `python` from the PATH
        script = HERE / "deterministic.py" if self.kind == "deterministic" else ROOT / "launch" / "train.py"
        command = [sys.executable, programs / "deepspeed", "--num_gpus", "1", "--master_port", str(port), script]
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": self.job.threads,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "analysis")]),
        }  # fmt: skip
        environment |= {"DS_ACCELERATOR": "cpu"} if self.job.device == "cpu" else {}
        with self.output.open("ab") as log:
            return subprocess.Popen(
                [*map(str, command), *self.arguments],
                env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """The launcher's exit code. Ends all of the job where it takes too long."""
        try:
            return process.wait(self.job.patience(240))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def finish(self) -> Mapping[str, Any]:
        """Train to the end; the last loss and what was complained about."""
        code = self.wait(self.start())
        if code or not (self.folder / "done.json").exists():
            raise FailedCheckError(f"{self.name} ended with {code}:\n{self.tail()}")
        losses = self.losses()
        if self.job.size.recipe == "debug":  # learns next to nothing in so few steps
            holds = len(losses) == self.steps
        else:
            holds = len(losses) == self.steps and losses[self.steps] < losses[1]
        return require(holds, "steps are missing, or nothing was learnt", {"loss": losses[self.steps]})

    def needed(self) -> Launched:
        """This run, done: trained now where no check before has trained it."""
        with self._lock:
            if not (self.folder / "done.json").exists():
                self.finish()
        return self

    def signalled(self, number: int, share: float) -> int:
        """Train, and signal the training process once that share of the steps is done; the last step on record."""
        process = self.start()
        try:
            until = time.monotonic() + self.job.patience(240)
            while process.poll() is None and max(self.losses(), default=0) < share * self.steps:
                if time.monotonic() > until:
                    raise TimeoutError(f"{self.name} did not reach the step of its signal:\n{self.tail()}")
                time.sleep(0.01)
            require(process.poll() is None, f"{self.name} ended before the signal:\n{self.tail()}", {})
            os.kill(self.record("start", "resume")["process"]["pid"], number)
        finally:
            self.wait(process)
        return max(self.losses())

    def record(self, *events: str) -> dict[str, Any]:
        """The last event of these kinds; KeyError where there is none."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        found = [event for event in map(json.loads, lines) if event["event"] in events]
        if not found:
            raise KeyError(f"{self.name} has no event {events}:\n{self.tail()}")
        return found[-1]

    def metrics(self) -> list[dict[str, Any]]:
        from qatscale.tracking.run_folder import RunFolder

        return RunFolder(self.folder).records("metrics") if (self.folder / "metrics.jsonl").exists() else []

    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.metrics()}

    def tail(self) -> str:
        log = self.folder / "logs" / "rank-0.log"
        texts = [path.read_text(errors="replace")[-4000:] for path in (self.output, log) if path.exists()]
        return "\n".join(texts)


class Job:
    def __init__(self, device: str, record: Record, work: Path) -> None:
        self.device, self.record, self.work = device, record, work
        self.size = SIZES[device]
        self.threads = "1" if device == "cpu" else "4"
        self._runs: dict[str, Launched] = {}

    def patience(self, most: float) -> float:
        """Seconds to wait for a process: up to 30 beyond the record's time."""
        return max(1.0, min(most, self.record.seconds_left + 30))

    def run(self, name: str, ds_config: str, bits: int, kind: str = "ordinary") -> Launched:
        return Launched(self, name, ds_config, bits, kind)

    def whole(self, stage: int, precision: str, bits: int, more: str = "") -> Launched:
        """A run that goes through to its end; several checks look at the same one."""
        name = f"z{stage}-{precision}-{bits}bit{more and '-'}{more}"
        ds_config = f"zero{stage}_{precision}" + ("_offload" if more == "offload" else "")
        return self._runs.setdefault(name, self.run(name, ds_config, bits))

    # --- checks ---

    def data(self) -> Mapping[str, Any]:
        """Token shards of a Markov chain: something to learn, the same everywhere, and no text needed."""
        from qatscale.data.adopt import adopt
        from qatscale.data.indexed_writer import IndexedWriter

        size = self.size
        most = max(size.steps * size.tokens_per_step[0], size.measured_steps * size.tokens_per_step[1])
        folder, counts = self.work / "data", {"train": most + 4096, "validation": 16 * max(size.tokens_per_step)}
        folder.mkdir(parents=True)
        for seed, (split, count) in enumerate(counts.items()):
            tokens = markov_chains(size.vocabulary, 256, -(-count // 256), seed)
            writer = IndexedWriter(folder / split, np.dtype(np.uint16))
            for document in tokens:
                writer.add(document, np.array([len(document)]))
            writer.finish()
        adopt(folder, train=["train"], validation=["validation"], vocab_size=size.vocabulary)
        return {"tokens": counts["train"]}

    def agree(self, runs: Sequence[Launched], tolerance: float) -> Mapping[str, Any]:
        """Losses of every step of every run against the first run's."""
        first = runs[0].needed().losses()
        worst = {run.name: largest_difference(run.needed().losses(), first) for run in runs[1:]}
        holds = all(difference <= tolerance for difference in worst.values())
        return require(holds, f"losses part from {runs[0].name}'s by more than {tolerance}", worst)

    def killed_and_resumed(self, run: Launched, whole: Launched, exactly: bool) -> Mapping[str, Any]:
        """SIGKILL before the switch, then the same command again; against the run that nobody killed."""
        from kill_points import differences

        last = run.signalled(signal.SIGKILL, KILL)
        require(not (run.folder / "done.json").exists(), "it was over before the kill", {})
        run.finish()
        whole.needed()
        resumed = run.record("resume")["step"]
        numbers = {"killed after step": last, "resumed from": resumed,
                   "largest relative difference": largest_difference(run.losses(), whole.losses()),
                   "bit for bit": not (found := differences(run.folder, whole.folder))}  # fmt: skip
        require(last - resumed <= self.size.steps // 6, "more than one interval was lost", numbers)
        if exactly:
            return require(not found, "; ".join(found[:5]), numbers)
        limit = TOLERANCE["bf16" if "bf16" in run.name else "fp32"]
        return require(numbers["largest relative difference"] <= limit, f"more than {limit}", numbers)

    def stopped_and_moved(self, run: Launched, moved: Launched, whole: Launched, limit: float) -> Mapping[str, Any]:
        """SIGTERM after the switch saves; `moved` is the same run under another ZeRO stage and goes on from there."""
        run.signalled(signal.SIGTERM, STOP)
        stopped = run.record("stopped")["step"]
        saved = (run.folder / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").exists()
        moved.finish()
        whole.needed()
        numbers = {"stopped at": stopped, "resumed from": moved.record("resume")["step"],
                   "largest relative difference": largest_difference(moved.losses(), whole.losses())}  # fmt: skip
        holds = saved and numbers["resumed from"] == stopped and numbers["largest relative difference"] <= limit
        return require(holds, f"not saved, not resumed from there, or more than {limit} apart", numbers)

    def evaluated(self, run: Launched, bits: int, limit: float) -> Mapping[str, Any]:
        """`qatscale evaluate` in three views against the run's own final evaluation."""
        run.needed()
        command = f"from qatscale.cli import main; main(['evaluate', {str(run.folder)!r}, '--ptq', '{bits}', '--json'])"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "analysis")])}
        environment |= {"DS_ACCELERATOR": "cpu"} if self.device == "cpu" else {}
        done = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False,
            timeout=self.patience(200),
        )  # fmt: skip
        require(done.returncode == 0, f"it ended with {done.returncode}:\n{done.stdout}\n{done.stderr[-4000:]}", {})
        found = json.loads(done.stdout[done.stdout.index("{") :])
        losses = {view: value["loss"] for view, value in found["views"].items()}
        final = json.loads((run.folder / "done.json").read_text())["metrics"]
        trained = {"fp": final["final/val_loss_fp_view"], "quantized": final["final/val_loss"],
                   f"ptq{bits}": final[f"final/val_loss_ptq{bits}"]}  # fmt: skip
        numbers = {**losses, "largest relative difference": max(abs(losses[v] / trained[v] - 1) for v in trained)}
        return require(numbers["largest relative difference"] <= limit, f"more than {limit}: {trained}", numbers)

    def measured(self, run: Launched) -> Mapping[str, Any]:
        """Median speed and memory of both phases; the first tenth of the steps of each is left out."""
        run.finish()
        numbers: dict[str, Any] = {}
        for phase in ("fp", "qat"):
            events = [event for event in run.metrics() if event["phase"].startswith("qat_") == (phase == "qat")]
            steady = events[len(events) // 10 :]
            speeds = sorted(event["tokens_per_second"] for event in steady)
            quarter = len(speeds) // 4
            numbers[f"{phase} tokens/s"] = float(median(speeds))
            numbers[f"{phase} quartiles"] = f"{speeds[quarter]:.4g} to {speeds[-1 - quarter]:.4g}"
            numbers[f"{phase} GiB"] = float(median(event["memory_gib"] for event in steady))
            mfu = [event["mfu"] for event in steady if event["mfu"] is not None]
            numbers[f"{phase} MFU"] = float(median(mfu)) if mfu else "unknown peak"
        numbers["qat over fp"] = numbers["qat tokens/s"] / numbers["fp tokens/s"]
        return numbers

    # --- the order of things ---

    def everything(self, parts: Sequence[str] = PARTS) -> None:
        self.record.check("token shards", self.data)
        if "compare" in parts:
            self.compare()
        if "stop" in parts:
            self.stop()
        if "speed" in parts:
            for stage in STAGES:
                run = self.run(f"measured-z{stage}-bf16", f"zero{stage}_bf16", 4, "measured")
                self.record.check(f"speed and memory: ZeRO-{stage}, bf16, 4 bits", partial(self.measured, run))
        self.record.check("warnings", self.warnings)

    def compare(self) -> None:
        """Stages, precisions and repetitions."""
        alike = {(precision, bits): [self.whole(stage, precision, bits) for stage in STAGES]
                 for bits in BITS for precision in PRECISIONS}  # fmt: skip
        pairs = [(self.whole(1, "fp32", 2), self.whole(1, "fp32", 2, "again"), "fp32"),
                 (self.whole(1, "bf16", 2), self.whole(1, "bf16", 2, "again"), "bf16"),
                 (self.whole(2, "bf16", 2), self.whole(2, "bf16", 2, "offload"), "bf16")]  # fmt: skip
        runs = [*(run for stages in alike.values() for run in stages), *(other for _, other, _ in pairs)]
        self._all([(f"trains: {run.name}", run.finish) for run in runs])
        for (precision, bits), stages in alike.items():
            check = partial(self.agree, stages, TOLERANCE[precision])
            self.record.check(f"stages agree: {precision}, {bits} bits", check)
        for one, other, precision in pairs:
            check = partial(self.agree, [one, other], TOLERANCE[precision])
            self.record.check(f"{other.name} agrees with {one.name}", check)
        for bits in BITS:
            check = partial(self.agree, [alike["fp32", bits][0], alike["bf16", bits][0]], BF16_AGAINST_FP32)
            self.record.check(f"bf16 agrees with fp32: {bits} bits", check)

    def stop(self) -> None:
        """SIGKILL and SIGTERM, resume under the same and another stage; evaluation of what was saved."""
        tasks: list[tuple[str, Callable[[], Mapping[str, Any]]]] = []
        for stage, precision in ((1, "fp32"), (3, "bf16")):
            name, ds_config = f"z{stage}-{precision}", f"zero{stage}_{precision}"
            killed = self.run(f"killed-{name}", ds_config, 2, "deterministic")
            whole = self.run(f"whole-{name}", ds_config, 2, "deterministic")
            check = partial(self.killed_and_resumed, killed, whole, True)
            tasks.append((f"SIGKILL and resume, deterministic algorithms: {name}", check))
        killed = self.run("killed-ordinary-z1-bf16", "zero1_bf16", 2)
        check = partial(self.killed_and_resumed, killed, self.whole(1, "bf16", 2), False)
        tasks.append(("SIGKILL and resume, ordinary algorithms: z1-bf16", check))
        for precision, first, second in (("bf16", 1, 3), ("fp32", 3, 2)):
            name = f"stopped-{precision}"
            stopped, moved = (self.run(name, f"zero{stage}_{precision}", 4) for stage in (first, second))
            whole = self.whole(second, precision, 4)
            check = partial(self.stopped_and_moved, stopped, moved, whole, TOLERANCE[precision])
            tasks.append((f"SIGTERM under ZeRO-{first}, resume under ZeRO-{second}: {precision}", check))
        for run, bits, limit in ((self.whole(1, "fp32", 2), 2, 1e-4), (self.whole(3, "bf16", 4), 4, 5e-3)):
            tasks.append((f"three views: {run.name}", partial(self.evaluated, run, bits, limit)))
        self._all(tasks)

    def _all(self, tasks: Sequence[tuple[str, Callable[[], Mapping[str, Any]]]]) -> None:
        with ThreadPoolExecutor(self.size.jobs) as pool:
            list(pool.map(lambda task: self.record.check(*task), tasks))

    def warnings(self) -> Mapping[str, Any]:
        """What the runs complained about, each once: for whoever reads the record; never fails."""
        stamp = re.compile(r"\x1b\[\d*m|^\[[\d :,-]+\]")
        texts = "\n".join(path.read_text() for path in self.work.glob("*.log"))
        lines = {stamp.sub("", line).strip()[:160] for line in texts.splitlines() if "warning" in line.lower()}
        return {str(index): line.replace("|", "/") for index, line in enumerate(sorted(lines)[:20], 1)}


def largest_difference(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The largest relative difference of losses; infinite where the steps are not the same."""
    if not one or one.keys() != other.keys():
        return math.inf
    return max(abs(one[step] / other[step] - 1) for step in one)


def markov_chains(vocabulary: int, chains: int, length: int, seed: int) -> np.ndarray:
    """uint16 [chains, length]: any token is followed by one of 8, the same for every seed."""
    followers = np.random.default_rng(1000).integers(vocabulary, size=(vocabulary, 8), dtype=np.uint16)
    choices = np.random.default_rng(seed).integers(8, size=(length, chains))
    tokens = np.empty((length, chains), np.uint16)
    tokens[0] = np.arange(chains) % vocabulary
    for place in range(1, length):
        tokens[place] = followers[tokens[place - 1], choices[place]]
    return np.ascontiguousarray(tokens.T)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="for the record alone")
    parser.add_argument("--seconds", type=float, default=450, help="begin no check after so many")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--work", type=Path, help="a new folder for data and runs, 30 GB on a GPU; else a temporary one"
    )
    parser.add_argument("--commit", help="where the code lies in no repository")
    return parser.parse_args(given)


def main() -> int:
    options = arguments()
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    about = about_here(options.device, options.commit)
    record = Record(options.out, "main_job", f"The main job on {options.device}", about, options.seconds)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        Job(options.device, record, work).everything(options.parts)
    print(f"{len(record.failed)} of {len(record.checks)} checks failed")
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
