"""A real MLflow server: what it gets over HTTP, and what its page shows in a browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow.tracking import MlflowClient

from qatscale.tracking.follower import start_follower
from qatscale.tracking.mlflow_sync import track_sync
from qatscale.tracking.store import where_to_look
from tests.law.browser import CannotError, open_address
from tests.tracking.synthetic_runs import MakeRun, finish, log_metrics
from tests.tracking.test_tracking_follower import history, log_of, losses, wait_for

pytestmark = pytest.mark.dist


def test_a_real_server(make_run: MakeRun, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, artifacts too; and what went into a SQLite file directly is shown by the command that we name."""
    import shlex
    import shutil

    from qatscale.tracking.store import ui_command

    home = tmp_path / "server"
    home.mkdir()
    monkeypatch.chdir(home)  # where the server keeps the artifacts that it is sent
    shutil.copy(template, home / "mlflow.db")
    uri = f"sqlite:///{home}/mlflow.db"
    beside = make_run("beside", steps=100)
    beside.append("start", step=0)
    direct = track_sync(beside, uri)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [*shlex.split(ui_command(uri)), "--port", str(port), "--workers", "1"]
    # the server's job queue starts several more processes
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for("the server", lambda: server.poll() is not None or _answers(address), 120)
        folder = make_run("run", steps=100)
        folder.append("start", step=0)
        follower = start_follower(folder, address)
        log_metrics(folder, 0, 100)
        folder.append("metrics", step=101, loss=float("nan"), phase="stable")
        folder.append("metrics", step=102, loss=float("-inf"), phase="stable")
        finish(folder, {"fp": 2.5})
        assert follower.finish(90) is None, log_of(folder)
        client = MlflowClient(address)
        run_id = track_sync(folder)
        assert client.get_run(run_id).info.status == "FINISHED"
        assert history(address, run_id)[:10] == losses(folder)[:10]
        assert {step for step, _ in history(address, run_id)} == {*range(10, 101, 10), 101, 102}
        assert len(history(address, run_id)) == 12
        assert {a.path for a in client.list_artifacts(run_id)} >= {"recipe.yaml", "timeline.json"}
        shown = urlopen(f"{address}/get-artifact?path=recipe.yaml&run_uuid={direct}").read()
        assert shown == (beside.path / "recipe.yaml").read_bytes()
        branch = make_run("branch", scheme="fused", steps=100, switch=60, parent=(folder, 50), resolved=0.4)
        branch.append("start", step=50)
        log_metrics(branch, 50, 100)
        finish(branch, {"fp": 2.75, "quantized": 2.625})
        track_sync(branch, address)
        look_at_the_page(where_to_look([folder]), tmp_path)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def look_at_the_page(said: list[str], folder: Path) -> None:
    """The link opens on the runs, branches among them, and on charts of their losses; one click away are columns."""
    (line,) = said
    link = line.removeprefix("MLflow: ")
    try:
        page = open_address(link, folder)
    except CannotError as reason:
        pytest.skip(str(reason))
    assert "Model training" in page
    assert "Evaluation runs" not in page, "no page about language models' traces"
    assert all(name in page for name in ("run", "branch"))
    order = ["train/loss", "validation (2)", "val/loss_quantized", "final (", "final/val_loss", "train ("]
    charts = page.partition("training (1)")[2]
    places = [charts.find(text) for text in order]
    assert -1 not in places
    assert places == sorted(places)
    assert "2.63" in page, "the bar of the branch's final loss"
    table = open_address(link.replace("CHART", "TABLE"), folder)
    for shown in ("scheme", "bits", "qat.fraction", "final/val_loss", "branch", "fused", "0.4", "2.625", "2.75"):
        assert shown in table


def _answers(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False
