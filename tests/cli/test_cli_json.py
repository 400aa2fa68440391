"""What `--json` prints has the keys of the guide, no more and no fewer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qatlaw import synthetic
from qatscale.study.folder import StudyFolder
from qatscale.study.lay_out import lay_out
from tests.cli.bad_inputs import run_command
from tests.tracking.synthetic_runs import finish, make_run_in

GUIDE = Path(__file__).parents[2] / "analysis" / "guides" / "json-outputs.md"
DOCUMENTED = {
    command: re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    for command, text in re.findall(r"^## (qatscale .+?)$(.*?)(?=^## |\Z)", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
}


def children(value: Any) -> dict[str, Any]:
    """Key → value of an object, or of the first object of a list; `[]` marks a list that is documented as objects."""
    if isinstance(value, list):
        return {"[]": value[0]} if value and isinstance(value[0], dict) else {}
    return value if isinstance(value, dict) else {}


def compare(value: Any, documented: set[str], where: str) -> None:
    """Where the guide names keys below a place, it names all of them, except where it gives examples."""
    found = children(value)
    steps: dict[str, set[str]] = {}
    for path in documented:
        step, _, rest = (re.match(r"(\[\]|[^.\[]+)(?:\.)?(.*)", path) or pytest.fail(path)).group(1, 0, 2)
        steps.setdefault(step, set()).update([rest] if rest else [])
    if where not in ("timeline", "scale", "views"):
        assert steps.keys() == found.keys(), where
    assert steps.keys() <= found.keys(), where
    for step, below in steps.items():
        if below - {"[]"}:
            compare(found[step], below, f"{where}.{step}".lstrip("."))


@pytest.fixture(scope="module")
def place(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    settings = f"output={folder}/runs data.path={prepared} tokens=2560 tracking.uri=none evaluation.tokens=256"
    code, _, error = run_command(shlex.split(f"train debug name=first {settings}"))
    assert code == 0, error
    run = make_run_in(folder / "runs", "second")
    run.append("start", step=0)
    finish(run, {"fp": 3.0})
    run.close()
    table = synthetic.table(0, noise=0.0005).frame
    table[table["n_params"] < 2.5e8].to_csv(folder / "runs.csv", index=False)
    study = "name: s\nsizes: [{name: a, recipe: debug}]\ntokens: [10240]\nbits: [4]\nfractions: [0.5]\n"
    (folder / "study.yaml").write_text(study)
    lay_out(folder / "study.yaml", StudyFolder(folder / "FOLDER"))
    return folder


@pytest.mark.parametrize("command", DOCUMENTED)
def test_the_output_has_the_keys_of_the_guide(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = shlex.split(command)[1:]
    more = {"fit": ["--resamples", "0", "--no-compare"], "study": ["--law", "synthetic"]}.get(words[0], [])
    code, out, error = run_command([*words, *(more if "status" not in words else [])])
    assert code == 0, error
    compare(json.loads(out), set(DOCUMENTED[command]), "")
