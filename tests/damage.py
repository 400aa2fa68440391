"""Damaged files of every kind that qatscale reads, and what reads them. Any of them may be refused, none may break."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from qatscale.config.recipe import RECIPES
from qatscale.errors import EXIT_BAD_INPUT, UserError
from tests.cli.bad_inputs import run_command

ROOT = Path(__file__).parents[1]

LONG = 10_000
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 1.5, 2**31, 2**63, 10**400, -(10**30), 1e308, 5e-324, "NaN", "Infinity", float("nan"), "",
    "x" * LONG, "../..", "/", "\0", "\ud800", "1", [], {}, [[]], [1], {"a": {}}, [{}], "text",
]  # fmt: skip
DEEP = 100_000


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    path: str
    """Of one of its kind, in the world."""
    readers: tuple[Callable[[Path], object], ...]
    """What reads it, each of the world's folder."""
    sealed: bool = False
    """Whether a checksum covers every byte: a changed file is never accepted."""


def expand(world: Path) -> None:
    """Add to the world of bad inputs what they lack: universal layout, export, fit, study, table."""
    with contextlib.chdir(world):
        for typed in (
            "convert runs/trunk --to universal --out universal",
            "export runs/trunk --format hf --no-verify --out exported",
        ):
            code, _, error = run_command(shlex.split(typed))
            assert code == 0, error
        shutil.copy(RECIPES / "debug.yaml", "recipe.yaml")
        shutil.copy(ROOT / "ds_configs/zero3_bf16.json", "ds.json")
        write_fit_file()
        _write_study()
        write_landscape()
        _write_tables()


def write_fit_file() -> None:
    from qatlaw import synthetic
    from qatlaw.fit_file import FitFile, write_fit

    law = synthetic.law()
    ranges = {"n_params": (86e6, 2.2e9), "tokens": (2.3e9, 1.4e12), "bits": (1.0, 6.0), "s_total": (35.0, 1e5)}
    file = FitFile(
        format=1, form=law.form.name, coefficients=law.coefficients, intervals={"rho": (0.04, 0.05)},
        bootstrap={"level": 0.9, "thetas": [list(law.theta)] * 2, "unknown": [], "loss_sizes": None}, range=ranges,
        data={"hash": "x", "runs": 2, "source": "two runs"}, quality={"r2": 0.99}, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    write_fit("fit.json", file)


def _write_study() -> None:
    from qatscale.study.folder import StudyFolder
    from qatscale.study.lay_out import lay_out

    Path("study.yaml").write_text(
        "sizes: [debug]\ntokens: [25600]\nbits: [2]\nfractions: [0, 0.5]\nschemes: [fused]\nset: [data.path=data]\n"
    )
    folder = StudyFolder(Path("study"))
    folder.path.mkdir()
    lay_out(Path("study.yaml"), folder)
    claim = folder.claims.take(next(iter(folder.jobs)), 0, "a-1")
    assert claim is not None


def write_landscape() -> None:
    ends = {"before": "runs/trunk/checkpoints/step-00000005", "after": "runs/trunk/checkpoints/step-00000010"}
    inputs = ends | {"views": ["fp", "quantized"], "bits": 4, "points": 12}
    grid = [f"{x},{y},{3 + x * x + y * y},{3.5 + x * x + 2 * y * y}" for y in (0, -0.5, 0.5) for x in range(-1, 3)]
    folder = Path("landscape")
    folder.mkdir()
    Path(folder, "landscape.json").write_text(json.dumps({"inputs": inputs, "axes": {"unit": 1.0}}))
    Path(folder, "grid.csv").write_text("\n".join(["x,y,fp,quantized", *grid]))
    Path(folder, "path.csv").write_text("step,x,y,distance\n6,0.2,0.1,0.05\n8,0.5,0.1,0.07\n")


def _write_tables() -> None:
    import pandas as pd

    head = ["n_params", "bits", "tokens_fp", "tokens_qat", "loss", "scheme"]
    rows = [[86e6, 4, 1e9 * k, 1e8 * k, 3.5 - k / 10, "fused"] for k in range(1, 4)]
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    Path("table.csv").write_text(text.getvalue())
    pd.DataFrame(rows, columns=head).to_parquet("table.parquet")
    pd.DataFrame({"text": ["one", "two"]}).to_parquet("text.parquet")


# --- what reads them ---


def _rows(world: Path) -> None:
    from qatscale.tracking.compare import list_runs
    from qatscale.tracking.run_folder import RunFolder

    folder = RunFolder.open(world / "runs/trunk")
    rows, damaged = list_runs([folder])
    assert len(rows) + len(damaged) == 1


def _record(world: Path) -> None:
    from qatlaw.run_folders import run_record

    run_record(world / "runs/trunk")


def _trained(world: Path) -> None:
    from qatlaw.plan.run_folder import read_trained

    read_trained(str(world / "runs/trunk@5"))


def _typed(line: str) -> Callable[[Path], None]:
    def read(_: Path) -> None:
        code, out, error = run_command(line.split())
        assert "Traceback" not in out + error
        if code:
            assert code == EXIT_BAD_INPUT, error
            raise UserError(line, None, error)

    return read


RUN = (_rows, _record, _trained, _typed("runs runs"), _typed("compare runs/trunk runs/fresh"))


def _checkpoint(world: Path) -> None:
    from qatscale.engine.checkpoints.files import rotate
    from qatscale.engine.checkpoints.reader import open_checkpoint

    rotate(world / "runs/trunk/checkpoints", 100)
    _, reader = open_checkpoint(str(world / "runs/trunk"))
    reader.weights()


def _data(world: Path) -> None:
    from qatscale.data.reader import TokenStream

    for split in ("train", "validation"):
        TokenStream.open(world / "data", split, verify="full")


def _tokenizer(world: Path) -> None:
    from qatscale.data.tokenizer import load_tokenizer

    load_tokenizer(world / "data/tokenizer").encode_batch(["text"])


def _progress(world: Path) -> None:
    from qatscale.data.state import finished, resume

    (world / "half").mkdir(exist_ok=True)
    (world / "half/progress.json").write_bytes((world / "data/progress.json").read_bytes())
    resume(world / "half", {"a": 1})
    finished(world / "half", {"a": 1})


def _universal(world: Path) -> None:
    from qatscale.engine.checkpoints.universal import find_universal, read_universal

    folder = find_universal(world / "universal")
    if folder is not None:
        state = read_universal(folder, None)
        for name in state.shapes:
            state.read("weight", name)


def _export(world: Path) -> None:
    from qatscale.export.report import check_files

    check_files(world / "exported")


def _foreign(world: Path) -> None:
    """As a folder from elsewhere, which has no checksums."""
    from qatscale.model.hugging_face import attention_window, open_hugging_face, trained_length

    folder = world / "exported"
    _, state = open_hugging_face(folder)
    attention_window(folder), trained_length(folder)
    for name in state:
        state[name]


def _fit(world: Path) -> None:
    from qatlaw.planner_law import load_law

    load_law(str(world / "fit.json"))


def _tree(world: Path) -> None:
    from qatscale.study.folder import StudyFolder
    from qatscale.study.state import StudyState, progress

    folder = StudyFolder(world / "study")
    state = StudyState(folder)
    state.refresh()
    state.next_job(), state.counts(), state.failures()
    progress(state)
    folder.claims.has_claimed("a-1")
    for name in folder.jobs:
        folder.config(name)


def _study(world: Path) -> None:
    from qatscale.study.file import read_study
    from qatscale.study.grid import grid

    grid(read_study(world / "study.yaml"))


def _landscape(world: Path) -> None:
    from qatlaw.figures.landscape import drawn_landscape
    from qatlaw.landscape import read_landscape

    drawn_landscape(read_landscape(world / "landscape"), "landscape")


def _laid_out(world: Path) -> None:
    from qatscale.study.folder import StudyFolder
    from qatscale.study.lay_out import lay_out

    shutil.rmtree(world / "study/claims", ignore_errors=True)
    lay_out(world / "study.yaml", StudyFolder(world / "study"))


def _recipe(world: Path) -> None:
    from qatscale.config.recipe import load_run_config
    from qatscale.schedule.build import build_timeline

    build_timeline(load_run_config(world / "recipe.yaml"))


def _ds_config(world: Path) -> None:
    from qatscale.config.ds_config import corrected_ds_config, ds_config_warnings, merge_ds_config
    from qatscale.config.recipe import load_run_config

    config = load_run_config("debug", [f"engine.ds_config={world}/ds.json"])
    corrected, _ = corrected_ds_config(config)
    ds_config_warnings(config)
    merge_ds_config(config, corrected, 1)


def _records(name: str) -> Callable[[Path], None]:
    def read(world: Path) -> None:
        from qatscale.data.records import FileReader

        for record in FileReader(world / name, "text", "paragraph").records():
            record.text()

    return read


def _table(name: str) -> Callable[[Path], None]:
    def read(world: Path) -> None:
        from qatlaw.table import RunTable

        RunTable.read(world / name)

    return read


CHECKPOINT, STEP = "runs/trunk/checkpoints/step-00000010", "universal/step-00000010"
KINDS = {
    "run": Kind("runs/trunk/run.json", RUN),
    "timeline": Kind("runs/trunk/timeline.json", RUN),
    "done": Kind("runs/trunk/done.json", RUN),
    "metrics": Kind("runs/trunk/metrics.jsonl", RUN),
    "recorded recipe": Kind("runs/trunk/recipe.yaml", (*RUN, _checkpoint)),
    "checkpoint manifest": Kind(f"{CHECKPOINT}/manifest.json", (_checkpoint,)),
    "checkpoint shard": Kind(f"{CHECKPOINT}/shard-00000-of-00001.safetensors", (_checkpoint,), sealed=True),
    "data manifest": Kind("data/manifest.json", (_data,)),
    "data shard": Kind("data/validation-00000.bin", (_data,), sealed=True),
    "data index": Kind("data/validation-00000.idx", (_data,), sealed=True),
    "tokenizer card": Kind("data/tokenizer/qatscale_tokenizer.json", (_tokenizer,)),
    "tokenizer": Kind("data/tokenizer/tokenizer.model", (_tokenizer,), sealed=True),
    "universal side file": Kind(f"{STEP}/qatscale.json", (_universal,)),
    "universal weights": Kind(f"{STEP}/zero/embed.weight/fp32.pt", (_universal,), sealed=True),
    "universal count": Kind(f"{STEP}/zero/embed.weight/step.pt", (_universal,), sealed=True),
    "universal name": Kind("universal/latest_universal", (_universal,)),
    "universal recipe": Kind(f"{STEP}/recipe.yaml", (_universal,), sealed=True),
    "export.json": Kind("exported/export.json", (_export,)),
    "exported configuration": Kind("exported/config.json", (_foreign, _export)),
    "exported weights": Kind("exported/model.safetensors", (_export,), sealed=True),
    "weights from elsewhere": Kind("exported/model.safetensors", (_foreign,)),
    "fit.json": Kind("fit.json", (_fit,)),
    "study tree": Kind("study/tree.json", (_tree,)),
    "study job": Kind("study/jobs/debug-25.6K-fp.yaml", (_tree,)),
    "study's copy": Kind("study/study.yaml", (_laid_out,)),
    "study file": Kind("study.yaml", (_study,)),
    "ds_config": Kind("ds.json", (_ds_config,)),
    "landscape": Kind("landscape/landscape.json", (_landscape,)),
    "landscape's grid": Kind("landscape/grid.csv", (_landscape,)),
    "landscape's path": Kind("landscape/path.csv", (_landscape,)),
    "JSON lines": Kind("corpus.jsonl", (_records("corpus.jsonl"),)),
    "gzip": Kind("torn.jsonl.gz", (_records("torn.jsonl.gz"),)),
    "Parquet": Kind("text.parquet", (_records("text.parquet"),)),
    "table": Kind("table.csv", (_table("table.csv"),)),
    "Parquet table": Kind("table.parquet", (_table("table.parquet"),)),
}


# --- damages ---


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(content: Any, place: tuple[Any, ...], value: Any, drop: bool) -> Any:
    """A JSON value with something else, or nothing, at a place."""
    if not place:
        return value
    content = copy.deepcopy(content)
    at = content
    for key in place[:-1]:
        at = at[key]
    if drop:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return content


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def damages(draw: Any, raw: bytes, name: str) -> bytes:
    """Another content of a file: a value replaced or dropped where it is JSON or YAML, or its bytes damaged."""
    content: Any = None
    if name.endswith(".json"):
        content = json.loads(raw)
    elif name.endswith(".yaml"):
        import yaml

        content = yaml.safe_load(raw)
    if content is not None and draw(st.integers(0, 3)):
        place = draw(st.sampled_from(list(places(content))))
        value = draw(st.one_of(st.sampled_from(HOSTILE), st.integers(), st.floats(), st.text(max_size=20)))
        return as_bytes(json.dumps(changed(content, place, value, draw(st.booleans()))))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "replace", "deep", "empty", "repeat"]))
    at = draw(st.integers(0, max(0, len(raw) - 1)))
    match kind:
        case "flip":
            return flipped(raw, at, draw(st.integers(0, 7)))
        case "cut":
            return raw[:at]
        case "insert":
            return raw[:at] + draw(st.binary(min_size=1, max_size=20)) + raw[at:]
        case "replace":
            return raw[:at] + draw(st.binary(min_size=1, max_size=20)) + raw[at + 10 :]
        case "deep":
            return draw(st.sampled_from([b"[", b'{"a":', b"- ", b"a: {"])) * DEEP
        case "repeat":
            return raw[:at] + raw
    return b""


def flipped(raw: bytes, at: int, bit: int) -> bytes:
    content = bytearray(raw)
    if content:
        content[at] ^= 1 << bit
    return bytes(content)
