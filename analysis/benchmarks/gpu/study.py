"""A measured study on a GPU: many workers on one device, for as long as a command may take, and its rows brought home.

    python analysis/benchmarks/gpu/study.py --device cuda --study STUDY.yaml --text TEXT --work DIR --out RECORDS
    python analysis/benchmarks/gpu/study.py --device cpu …                     a test of this script

The text is prepared once into DIR/data/corpus, where the study file looks for it. The study's folder lies in DIR, so
that the same command goes on where the last one was cut off. A results.csv in RECORDS names runs that are done
elsewhere: they are not trained again. Writes RECORDS/results.csv, RECORDS/study.json and RECORDS/study.md; exit code 0:
no run failed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import Record, about_here, require

SAVING = 45.0
"""Seconds that workers may take to save and end."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="JSON lines to prepare; without it DIR/data/corpus has to exist")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--work", type=Path, required=True, help="data, runs and logs")
    parser.add_argument("--out", type=Path, required=True, help="for the record and results.csv")
    parser.add_argument("--workers-per-gpu", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=500, help="then the workers save and end")
    parser.add_argument("--commit", help="where the code lies in no repository")
    return parser.parse_args(given)


def prepare(options: argparse.Namespace) -> Mapping[str, Any]:
    from qatscale.data.manifest import Manifest
    from qatscale.data.prepare import prepare as prepare_text

    folder = options.work / "data" / "corpus"
    if not (folder / "manifest.json").exists():
        assert options.text is not None, f"{folder} does not exist, and --text is not given"
        prepare_text([str(options.text)], folder, vocab_size=options.vocab_size)
    return {"fingerprint": Manifest.load(folder).fingerprint}


def train(options: argparse.Namespace, record: Record) -> Mapping[str, Any]:
    """Train until all runs are done or the time is over; numbers of runs, tokens and tokens/s of all workers."""
    from qatscale.study.folder import StudyFolder
    from qatscale.study.state import StudyState

    folder = StudyFolder(options.work / "study")
    folder.path.mkdir(parents=True, exist_ok=True)
    known = options.out / "results.csv"
    if known.exists() and not folder.results.exists():
        shutil.copy(known, folder.results)
    per_gpu = ["--workers-per-gpu", str(options.workers_per_gpu)] if options.device == "cuda" else ["--workers", "2"]
    command = [sys.executable, "-m", "qatscale", "study", "run", str(options.study.resolve())]
    began, before = time.time(), set(folder.recorded())
    process = subprocess.Popen([*command, "--out", str(folder.path.resolve()), *per_gpu], cwd=options.work)
    try:
        process.wait(max(1.0, record.seconds_left - SAVING))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait(SAVING)
    seconds = time.time() - began
    if folder.results.exists():
        shutil.copy(folder.results, known)
    state = StudyState(folder)
    state.refresh()
    new = [folder.jobs[name] for name in folder.recorded() - before]
    tokens = sum(job.new_tokens for job in new)
    counts = state.counts()
    numbers = {"runs done here": len(new), "tokens": tokens, "seconds": round(seconds), "tokens/s": tokens / seconds}
    return require(not counts["failed"], f"{counts['failed']} runs failed", {**numbers, **counts})


def main() -> int:
    options = arguments()
    about = {**about_here(options.device, options.commit), "study": options.study.name}
    record = Record(options.out, "study", f"A study on {options.device}", about, options.seconds)
    record.check("the corpus", lambda: prepare(options))
    record.check("the study", lambda: train(options, record))
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
