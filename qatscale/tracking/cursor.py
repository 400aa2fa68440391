"""tracking.json of a run folder: where the run is uploaded to, and how far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from qatscale.files import read_json, write_json
from qatscale.tracking.run_folder import RunFolder, Status


@dataclass
class Cursor:
    """The state of a run's upload."""

    uri: str
    experiment: str
    run_id: str | None = None
    offset: int = 0
    """Bytes of metrics.jsonl that MLflow has confirmed."""
    described: bool = False
    """Parameters and the tags that never change are uploaded."""
    parent_run_id: str | None = None
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    """Size and modification time (ns) of each uploaded file."""
    status: Status | None = None
    """The run's status as MLflow knows it."""

    @classmethod
    def at(cls, folder: RunFolder, uri: str) -> Cursor:
        """Nothing uploaded yet, at this store."""
        return cls(uri, folder.recipe["tracking"]["experiment"])

    @classmethod
    def load(cls, folder: RunFolder) -> Cursor | None:
        if not folder.tracking_file.exists():
            return None
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in read_json(folder.tracking_file).items() if key in known})

    def save(self, folder: RunFolder) -> None:
        write_json(folder.tracking_file, asdict(self))
