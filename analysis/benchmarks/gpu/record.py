"""The record of a series of checks: none stops the others, and the files are complete whenever the script is killed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

GRACE = 60
"""Seconds that a check may run beyond the record's."""
PACKAGES = ("torch", "deepspeed", "numpy", "triton", "safetensors", "pydantic")


class Record:
    """Writes NAME.json and NAME.md into a folder as each check begins and ends. Checks may run in several threads.

    No check begins after so many seconds, and one in the main thread that runs GRACE longer is ended.
    """

    def __init__(self, out: Path, name: str, title: str, about: Mapping[str, str], seconds: float) -> None:
        self.out, self.name, self.title = out, name, title
        self.about = {"date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", *sys.argv]), **about}
        self.checks: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._end = self._began + seconds
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def check(self, name: str, what: Callable[[], Mapping[str, Any] | None]) -> None:
        """Run one check: passed unless it raises, or the time is over. What it returns are its numbers."""
        began = time.monotonic()
        entry: dict[str, Any] = {"check": name, "passed": False, "seconds": 0.0, "numbers": {}}
        cut_off = "the script ended while this check ran"
        with self._lock:
            place = len(self.checks)
            self.checks.append({**entry, "error": cut_off, "traceback": cut_off})
            self._write()
        in_main_thread = threading.current_thread() is threading.main_thread()
        try:
            if self.seconds_left <= 0:
                raise TimeoutError("not begun: the time was over")
            if in_main_thread:  # the only one that signals interrupt
                signal.signal(signal.SIGALRM, _too_long)
                signal.setitimer(signal.ITIMER_REAL, self.seconds_left + GRACE)
            entry["numbers"] = dict(what() or {})
            entry["passed"] = True
        except Exception as error:  # whatever it is: the others go on
            entry["error"] = f"{type(error).__name__}: {error}"
            entry["numbers"] = getattr(error, "numbers", {})
            entry["traceback"] = traceback.format_exc()
        finally:
            if in_main_thread:
                signal.setitimer(signal.ITIMER_REAL, 0)
        entry["seconds"] = round(time.monotonic() - began, 1)
        with self._lock:
            self.checks[place] = entry
            print(f"{'passed' if entry['passed'] else 'FAILED'}  {name}  {entry['seconds']} s  "
                  f"{_numbers(entry['numbers'])} {entry.get('error', '')[:2000]}", flush=True)  # fmt: skip
            self._write()

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [check for check in self.checks if not check["passed"]]

    def _write(self) -> None:
        seconds = round(time.monotonic() - self._began)
        content = {"title": self.title, **self.about, "seconds": seconds, "failed": len(self.failed),
                   "checks": self.checks}  # fmt: skip
        self._replace(f"{self.name}.json", json.dumps(content, indent=1) + "\n")
        lines = [f"# {self.title}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in self.about.items()]
        lines += [f"| time | {seconds} s |", f"| result | {len(self.checks) - len(self.failed)} of {len(self.checks)} "
                  "checks passed |", "", "| check | passed | seconds | numbers |", "|---|---|---|---|"]  # fmt: skip
        for check in self.checks:
            passed = "yes" if check["passed"] else "**no**"
            lines.append(f"| {check['check']} | {passed} | {check['seconds']} | {_numbers(check['numbers'])} |")
        for check in self.failed:
            lines += ["", f"## Failed: {check['check']}", "", "```", check["traceback"].rstrip(), "```"]
        self._replace(f"{self.name}.md", "\n".join(lines) + "\n")

    def _replace(self, name: str, text: str) -> None:
        """Write a file of which nobody sees a half."""
        part = self.out / f".{name}"
        part.write_text(text)
        part.replace(self.out / name)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"ended: it ran {GRACE} s beyond the time")


class FailedCheckError(AssertionError):
    """A check that failed, with the numbers it has found."""

    def __init__(self, message: str, numbers: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.numbers = dict(numbers or {})


def require(holds: bool, message: str, numbers: Mapping[str, Any]) -> Mapping[str, Any]:
    """The numbers where it holds, else FailedCheckError with them."""
    if not holds:
        raise FailedCheckError(message, numbers)
    return numbers


def about_here(device: str, commit: str | None) -> dict[str, str]:
    """Hardware, versions and commit, for a record's head. commit: where the code lies in no repository."""
    import torch

    from qatscale.tracking.environment import cpu_model, git_state

    git = git_state(Path(__file__).parent)
    if git:
        commit = git["commit"][:7] + (", with uncommitted changes" if git["dirty"] else "")
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    hardware = f"{os.cpu_count()} cores of {cpu_model()}"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        hardware = f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB; {hardware}"
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions.append(f"CUDA {torch.version.cuda}, NCCL {nccl}")
    return {"hardware": hardware, "versions": ", ".join(versions), "commit": commit or "unknown"}


def _numbers(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in numbers.items())  # fmt: skip
