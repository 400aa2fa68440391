"""The folder of one run. It is complete without MLflow.

::

    recipe.yaml  ds_config.json  run.json  environment.json  timeline.json     written when the run is created
    metrics.jsonl                                                              one event per line, only appended to
    tracking.json                                                              MLflow: which store and run, how far
    logs/  checkpoints/  figures/  exports/
    done.json                                                                  the completion marker, written last

Only rank 0 of the training loop writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from qatscale.config.places import find_moved
from qatscale.errors import UserError
from qatscale.files import write_json
from qatscale.supervise import process
from qatscale.tracking.records import Appender, Record, Tail, live

Status = Literal["imported", "created", "running", "running?", "stopped", "failed", "killed", "done"]
"""`imported`: never trained here, only branched from. `created`: no step begun. `running?`: the process is on another
machine, and only that machine can look for it. `stopped`: by a signal, after saving. `failed`: by an error. `killed`:
the process has ended without a record."""

EVENTS = ("start", "resume", "metrics", "validation", "switch", "spike", "checkpoint", "stopped", "failed", "final")
_LIFE = ("start", "resume", "stopped", "failed")
"""Events that say whether a process writes the folder."""


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is more than a float holds."""
    return math.inf if loss > 709 else math.exp(loss)


class RunFolder:
    """A run's folder. `new_run.create_run_folder` makes one, `open` finds one."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.run_file = self.path / "run.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.done_file = self.path / "done.json"
        self.tracking_file = self.path / "tracking.json"
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.figures = self.path / "figures"
        self.exports = self.path / "exports"
        self._appender: Appender | None = None
        self._life_tail = Tail(self.metrics_file)
        self._last_sign: Record | None = None
        self._writer: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Raises UserError where no run exists."""
        self = cls(path)
        if not self.run_file.exists():
            problem = "the folder does not exist." if not self.path.exists() else "the folder holds no run.json."
            raise UserError("run", str(path), problem, "Give the folder of a run.")
        return self

    @property
    def name(self) -> str:
        return self.path.resolve().name

    # what is known

    def _read(self, name: str) -> dict[str, Any]:
        from qatlaw.run_files import read_run_file  # a run that trains needs no schemas

        return read_run_file(self.path / name)

    @property
    def run(self) -> dict[str, Any]:
        return self._read("run.json")

    @property
    def parent(self) -> RunFolder | None:
        """The run that this one was branched from; None without one, or where its folder no longer exists.

        Run folders are moved, so the parent is looked for at its old path and beside this run. UserError where a run
        descends from itself.
        """
        parent, seen = self._parent(), {self.path.resolve()}
        older = parent
        while older is not None:
            if (path := older.path.resolve()) in seen:
                raise UserError("run", str(older.run_file), "is damaged: it descends from itself.", "Restore the file.")
            seen.add(path)
            older = older._parent()
        return parent

    def _parent(self) -> RunFolder | None:
        parent = self.run["parent"]
        if parent is None:
            return None
        places = (Path(parent["folder"]), self.path.resolve().parent / parent["name"])
        return next((RunFolder(place) for place in places if (place / "run.json").exists()), None)

    @property
    def imported(self) -> str | None:
        """The origin of a model that this run holds and did not train; None for a run that trains."""
        return self.run.get("imported")

    @property
    def timeline(self) -> dict[str, Any]:
        """timeline.json, see `Timeline.to_dict`; runs of earlier versions have fewer of its keys."""
        return self._read("timeline.json")

    @property
    def recipe(self) -> dict[str, Any]:
        """recipe.yaml as plain data, so that runs remain readable when RunConfig changes."""
        return self._read("recipe.yaml")

    @property
    def scheme(self) -> str:
        return self.recipe["qat"]["scheme"]

    @property
    def data(self) -> list[Path]:
        """The folders of its prepared data, also where they were moved together with the run's."""
        recipe = self.recipe
        find_moved(recipe, self.path)
        data = recipe["data"]
        sources = sorted({*(data.get("mix") or ()), *(data.get("cooldown_mix") or ())}) or [""]
        return [Path(data["path"], name).absolute() for name in sources] if data["path"] else []

    def records(self, *events: str) -> list[Record]:
        """The events of metrics.jsonl, all kinds or these, without the ones that a later resume superseded."""
        found = live(Tail(self.metrics_file))
        return [record for record in found if not events or record["event"] in events]

    @property
    def is_done(self) -> bool:
        return self.done_file.exists()

    @property
    def final(self) -> dict[str, Any] | None:
        """The final metrics by their stable names, None while the run is not done."""
        return self._read("done.json")["metrics"] if self.is_done else None

    @property
    def status(self) -> Status:
        """Reads only what was appended since the last call."""
        if self.is_done:
            return "done"
        self._read_on()
        if self._last_sign is None:
            return "imported" if self.imported else "created"
        if self._last_sign["event"] in ("stopped", "failed"):
            return self._last_sign["event"]
        alive = process.is_alive(self._last_sign["process"])
        return "running?" if alive is None else "running" if alive else "killed"

    @property
    def failure(self) -> str | None:
        """Why the run failed, where that is its status."""
        self._read_on()
        return None if self.is_done or self._last_sign is None else self._last_sign.get("error")

    @property
    def has_ended(self) -> bool:
        """Whether the run's process has certainly ended; False where that is unknown."""
        return self.status not in ("created", "running", "running?")

    @property
    def writer(self) -> dict[str, Any] | None:
        """The process of the last `start` or `resume`, see `process.identity`."""
        self._read_on()
        return self._writer

    def _read_on(self) -> None:
        for record in self._life_tail:
            if record["event"] in _LIFE:
                self._last_sign = record
                self._writer = record.get("process", self._writer)

    # writing, by rank 0

    def append(self, event: str, **fields: Any) -> Record:
        """Append one event and return it. The kernel has all of it when this returns.

        Every record gets `time` (seconds since 1970); `start` and `resume` also `process`, the writer from now on.
        The first append repairs a last line that a power failure tore. Raises OSError, e.g. for a full disk.
        """
        assert event in EVENTS, event
        record: Record = {"event": event, "time": time.time(), **fields}
        if event in ("start", "resume"):
            record["process"] = process.identity()
        if self._appender is None:
            self._appender = Appender(self.metrics_file)
        self._appender.append(record)
        return record

    def finish(self, step: int, final: Mapping[str, Any]) -> None:
        """Append the `final` event, then write done.json. Once it exists, everything before it is on the disk."""
        record = self.append("final", step=step, metrics=final)
        assert self._appender is not None
        self._appender.sync()
        write_json(self.done_file, {"finished": record["time"], "step": step, "metrics": record["metrics"]})

    def close(self) -> None:
        if self._appender is not None:
            self._appender.close()
            self._appender = None
