"""The guides' shell and Python blocks and notebooks run as they stand, in order, from an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import unlaunched

FOLDER = Path(__file__).parents[1] / "analysis" / "guides"
GUIDES = sorted(path for path in FOLDER.glob("[a-z]*") if path.suffix in (".md", ".ipynb"))


def script(guide: Path) -> str:
    """The blocks as one shell script; other languages (console, yaml, text) are for reading."""
    if guide.suffix == ".ipynb":
        cells = [cell for cell in json.loads(guide.read_text())["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "outputs are not committed"
        return python("\n".join("".join(cell["source"]) for cell in cells) + "\n")
    lines = ["set -euo pipefail"]
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", guide.read_text(), re.DOTALL | re.MULTILINE):
        if language == "sh":
            lines.append(code)
        elif language == "python":
            lines.append(python(code))
    return "\n".join(lines)


def python(code: str) -> str:
    return f"python - <<'END-OF-BLOCK'\n{code}END-OF-BLOCK"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_every_block_runs(guide: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = unlaunched() | {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "MPLBACKEND": "agg"}
    if guide.stem != "first-run":  # every other run would start a process that loads MLflow, too
        environment["MLFLOW_TRACKING_URI"] = "none"
    done = subprocess.run(
        ["bash", "-c", script(guide)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_table_of_guides_is_complete() -> None:
    listed = re.findall(r"\]\(([\w-]+\.(?:md|ipynb))\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == [guide.name for guide in GUIDES]
