"""How long until a job on two hosts has ended everywhere after each kind of failure, and what it says. Needs root.

    python analysis/benchmarks/faults.py [--stall 20] [--only kill kill0 stop cut term lost]

The hosts are network namespaces (tests/launch/hosts.py), the job is started by launch/pdsh.sh on CPU. The table goes to
faults.md beside this file, by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.launch.hosts import Host, two_hosts  # noqa: E402

RUN = ["debug", "tracking.uri=none", "tokens=100M", "checkpoint.interval=1280"]


def trainer(host: Host) -> int:
    (process,) = host.processes("train.py", without="deepspeed")  # launchers name both
    return process


FAULTS: dict[str, Callable[[Host, Host], object]] = {
    "kill": lambda _, b: os.kill(trainer(b), signal.SIGKILL),
    "kill0": lambda a, _: os.kill(trainer(a), signal.SIGKILL),
    "stop": lambda _, b: os.kill(trainer(b), signal.SIGSTOP),
    "cut": lambda _, b: b.wire("down"),
    "term": lambda a, _: os.kill(runner(a), signal.SIGTERM),
    "lost": lambda a, _: [os.kill(pid, signal.SIGKILL) for pid in a.processes("ssh\0-o")],
}
"""SIGKILL of rank 1 or 0, SIGSTOP of rank 1, the second host's interface down, SIGTERM to the script, ssh killed."""


def runner(host: Host) -> int:
    """The `deepspeed` command that launch/pdsh.sh became."""
    return min(host.processes("bin/deepspeed", without="sh\0-c"))


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return sum('"event": "metrics"' in line for line in metrics.read_text().splitlines()) if metrics.exists() else 0


def measure(name: str, hosts: tuple[Host, Host], folder: Path, data: Path, stall: float) -> None:
    run = folder / name
    environment = {
        "HOSTFILE": str(folder / "hostfile"), "TMPDIR": str(folder), "VENV": sys.prefix, "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    arguments = [*RUN, f"name={name}", f"output={folder}", f"data.path={data}", f"engine.stall_timeout={stall}"]
    job = hosts[0].run([ROOT / "launch" / "pdsh.sh", *arguments], folder, **environment)
    while steps(run) < 20:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    start = time.monotonic()
    FAULTS[name](*hosts)
    ended: dict[str, float] = {}
    while len(ended) < 2 and time.monotonic() - start < 300:
        for host in hosts:
            if host.name not in ended and not host.processes("train.py", without="deepspeed"):
                ended[host.name] = time.monotonic() - start
        time.sleep(0.1)
    hosts[1].wire("up")
    output = job.communicate(timeout=200)[0]
    command = time.monotonic() - start
    told = [line for line in output.splitlines() if "rank " in line and " at step " in line]
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    print(f"{name}: processes gone after {ended} s, the command after {command:.0f} s, code {job.returncode}")
    print("  " + "\n  ".join(told or ["(nothing told)"]), flush=True)
    print(f"  last record: {last['event']} at step {last['step']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stall", type=float, default=20.0)
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--data", type=Path, help="prepared data with 512 pieces; default: made anew")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        data = options.data
        if data is None:
            from qatscale.data.prepare import prepare

            data = folder / "data"
            prepare(["self:600K"], data, vocab_size=512, validation_fraction=0.05, workers=1)
        with two_hosts(folder) as hosts:
            (folder / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
            for name in options.only:
                measure(name, hosts, folder, data, options.stall)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
