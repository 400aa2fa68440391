"""Kill every command but training at random moments, type it again, and compare with the result of one left alone.

    python analysis/benchmarks/command_kills.py --count 20 --seed 0 --out outputs/command_kills [--only fit export]

Training is killed by kill_points.py, in every layout. Here a command and all its processes end by SIGKILL, at a random
share of the time that it takes. The same command line then has to come to its end: exit code 0, or 2 where the result
was complete already. The result has to be that of a command nobody killed, byte for byte but for times. Prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from kill_points import differences
from killing import FORK, preload

TIMES = ("created", "started", "finished", "seconds")
STUDY = """\
sizes: [debug]
tokens: [10240]
bits: [2]
fractions: [0, 0.5]
schemes: [fused]
set: [data.path=data, evaluation.tokens=1024, schedule.warmup_fraction=null, schedule.warmup_tokens=1024]
"""


@dataclass(frozen=True)
class Command:
    typed: str
    """After `qatscale`; OUT is its result."""
    same: Callable[[Path, Path], list[str]]
    """(result, that of the command nobody killed) -> how they differ."""


@dataclass
class Counts:
    killed: int = 0
    early: int = 0
    """Kills before anything was written."""
    late: int = 0
    """Draws behind the command's end."""
    wrong: list[str] = field(default_factory=list)


def same_files(one: Path, other: Path) -> list[str]:
    digests = [
        {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*")
         if p.is_file() and p.name != ".lock"}
        for folder in (one, other)
    ]  # fmt: skip
    names = sorted(digests[0].keys() | digests[1].keys())
    return [f"{name} differs" for name in names if digests[0].get(name) != digests[1].get(name)]


def same_law(one: Path, other: Path) -> list[str]:
    laws = [{key: v for key, v in json.loads(path.read_bytes()).items() if key not in TIMES} for path in (one, other)]
    return [] if laws[0] == laws[1] else ["the laws differ"]


def same_results(one: Path, other: Path) -> list[str]:
    """Losses of a study by run."""
    rows: list[Any] = []
    for folder in (one, other):
        with (folder / "results.csv").open(newline="") as file:
            rows.append([{k: v for k, v in row.items() if "loss" in k or k == "name"} for row in csv.DictReader(file)])
    return [] if rows[0] == rows[1] else ["results.csv differs"]


RUN = "tokens=10240 batch.micro_batch=4 evaluation.tokens=1024 tracking.uri=none data.path=data"
COMMANDS = {
    "prepare": Command("prepare corpus --out OUT --vocab-size 512 --workers 2 --validation-fraction 0.05", same_files),
    "branch": Command("branch runs/trunk@20 name=NAME output=OUT qat.scheme=fused qat.bits=2", differences),
    "convert to universal": Command("convert runs/trunk --to universal --out OUT", same_files),
    "convert to hf": Command("convert runs/trunk --to hf --out OUT", same_files),
    "export hf": Command("export runs/quantized --format hf --out OUT", same_files),
    "export gguf": Command("export runs/quantized --format gguf --fallback --no-verify --out OUT", same_files),
    "fit": Command("fit --table table.csv --no-compare --resamples 20 --out OUT", same_law),
    "study run": Command("study run study.yaml --workers 2 --out OUT", same_results),
}


def qatscale(typed: str, log: Path, kill_after: float | None = None) -> tuple[int | None, float]:
    """(exit code, seconds) of a command; None: killed."""
    process = FORK.Process(target=_type, args=(shlex.split(typed), log))
    began = time.monotonic()
    process.start()
    process.join(kill_after)
    if process.exitcode is None:
        root = psutil.Process(process.pid)
        for one in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.join()
        return None, time.monotonic() - began
    return process.exitcode, time.monotonic() - began


def _type(words: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from qatscale.cli import main

    main(words)


def make_world() -> None:
    """Text, data, two runs, a table and a study file in the working folder."""
    import pandas as pd

    from qatlaw import synthetic
    from qatscale.data import selfcorpus

    Path("corpus").mkdir()
    for i, text in enumerate(selfcorpus.documents(600_000)):
        Path(f"corpus/{i:04d}.txt").write_text(text)
    Path("study.yaml").write_text(STUDY)
    law = synthetic.law()
    rows = [
        (n, bits, d - d * f, d * f, float(law.loss(n, d - d * f, d * f, bits)), "fused")
        for n in (86e6, 396e6, 759e6) for d in (2.3e9, 23e9, 100e9) for bits in (2, 4) for f in (0.1, 0.3, 0.6)
    ]  # fmt: skip
    names = ["n_params", "bits", "tokens_fp", "tokens_qat", "loss", "scheme"]
    pd.DataFrame(rows, columns=names).to_csv("table.csv", index=False)
    for typed in (
        "prepare corpus --out data --vocab-size 512 --workers 1 --validation-fraction 0.05",
        f"train debug name=trunk qat.scheme=fp qat.fraction=auto checkpoint.keep_at=[5120] {RUN}",
        f"train debug name=quantized qat.bits=2 {RUN}",
    ):
        code, _ = qatscale(typed, Path("log"))
        if code:
            raise RuntimeError(f"{typed}:\n{Path('log').read_text()}")


def result(name: str, out: Path) -> Path:
    return out / "run" if name == "branch" else out


def kill(name: str, command: Command, number: int, share: float, seconds: float, counts: Counts) -> float:
    """One kill, the same command again, and the comparison. Returns the seconds to expect of the command next time."""
    out, whole = Path(f"{name.replace(' ', '-')}-{number}"), Path(f"whole-{name.replace(' ', '-')}")
    typed = command.typed.replace("OUT", str(out)).replace("NAME", "run")
    log = Path(f"{out}.log")
    code, _ = qatscale(typed, log, share * seconds)
    counts.killed += code is None
    counts.late += code is not None
    counts.early += code is None and not out.exists()
    again, took = qatscale(typed, log)
    text = log.read_text(errors="replace")
    if again not in (0, 2) or (again == 2 and "exists already" not in text):
        counts.wrong.append(f"{out}: killed at {share:.2f}, then exit code {again}: {text[-300:]}")
        return seconds
    found = command.same(result(name, out), result(name, whole))
    counts.wrong += [f"{out}: killed at {share:.2f}, {what}" for what in found]
    left = [path.name for path in Path().iterdir() if ".partial" in path.name]
    counts.wrong += [f"{out}: {path} is left" for path in left]
    if not found:
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    # the first measurement may be of a busy moment; what continues takes less than the command
    return min(seconds, max(took, seconds / 2)) if again == 0 else seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/command_kills"), help="a new folder")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--minutes", type=float, default=60, help="no kill after so many")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    os.chdir(options.out)
    preload()
    make_world()
    draw, end, counts = random.Random(options.seed), time.monotonic() + 60 * options.minutes, {}
    seconds: dict[str, float] = {}
    for name in options.only:
        counts[name] = Counts()
        whole = f"whole-{name.replace(' ', '-')}"
        typed = COMMANDS[name].typed.replace("OUT", whole).replace("NAME", "run")
        code, seconds[name] = qatscale(typed, Path(f"{whole}.log"))
        if code:
            raise RuntimeError(f"{typed}:\n{Path(f'{whole}.log').read_text()}")
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    for number in range(options.count):
        for name in options.only:
            if time.monotonic() < end:
                seconds[name] = kill(name, COMMANDS[name], number, draw.random(), seconds[name], counts[name])
                print(f"{number} {name} {counts[name].wrong[-1:]}", flush=True)
    print("\n| command | seconds | killed | before it wrote | too late | wrong |\n|---|---|---|---|---|---|")
    for name, found in counts.items():
        row = [name, f"{seconds[name]:.1f}", found.killed, found.early, found.late, len(found.wrong)]
        print(f"| {' | '.join(map(str, row))} |")
    wrong = [line for found in counts.values() for line in found.wrong]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
