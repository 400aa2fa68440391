"""The landscape: closed forms of a quadratic bowl, a stop in the middle, and a real run through the command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from qatlaw.landscape import GRID, Landscape, read_landscape
from qatscale.config.recipe import load_run_config
from qatscale.data.open import open_validation
from qatscale.engine.checkpoints.reader import open_checkpoint
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.errors import UserError
from qatscale.model.lazy_state import State
from qatscale.quant.plugin import PlainMasters
from qatscale.schedule.build import build_timeline
from qatscale.study.landscape import adam_step
from qatscale.study.plane import Grid, Plane, measure
from qatscale.train.evaluate import evaluate_checkpoint
from qatscale.train.run import train
from qatscale.train.validation import summed_loss
from tests.cli.bad_inputs import run_command

SHAPES = {"a": (3, 4), "b": (5,)}
GRID_SIZE = Grid(4, 0.5)


def as_state(flat: np.ndarray) -> dict[str, Tensor]:
    a, b = np.split(flat, [12])
    return {"a": torch.from_numpy(a.reshape(3, 4).copy()), "b": torch.from_numpy(b.copy())}


def flat(state: State) -> np.ndarray:
    return np.concatenate([state[name].numpy().ravel() for name in SHAPES])


class Bowl:
    """A loss ½ (w − m)ᵀ H (w − m), and a plane through three random points of its space."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.before, self.after, self.step, self.lowest = rng.normal(size=(4, 17))
        root = rng.normal(size=(17, 17))
        self.hessian = root @ root.T
        self.plane = Plane.through(*map(as_state, (self.before, self.after, self.step)))
        along = self.after - self.before
        rest = self.step - along * (self.step @ along) / (along @ along)
        self.directions = np.stack([along, rest * np.linalg.norm(along) / np.linalg.norm(rest)])

    def at(self, weights: np.ndarray) -> float:
        return float((weights - self.lowest) @ self.hessian @ (weights - self.lowest) / 2)

    def losses(self, weights: State, x: float) -> Sequence[float]:  # noqa: ARG002 - the signature of `Losses`
        loss = self.at(flat(weights))
        return loss, 2 * loss + 1

    def measured(self, file: Path) -> Landscape:
        measure(self.plane, GRID_SIZE, self.losses, ["fp", "quantized"], file)
        return Landscape({"views": ["fp", "quantized"]}, {}, pd.read_csv(file), None)


def test_a_bowl_has_its_own_curvatures(tmp_path: Path) -> None:
    """Second differences of a quadratic are exact: dᵀHd along each direction d, and dᵀHe between them."""
    bowl = Bowl()
    landscape = bowl.measured(tmp_path / GRID)
    expected = bowl.directions @ bowl.hessian @ bowl.directions.T
    for x in (0.0, 1.0):
        for view, factor in (("fp", 1), ("quantized", 2)):
            found, wider = landscape.curvature(view, x), landscape.curvature(view, x, 2)
            assert found is not None
            assert wider is not None
            computed = [[found.along, found.mixed], [found.mixed, found.across]]
            np.testing.assert_allclose(computed, factor * expected, rtol=1e-9)
            assert found.ratio == pytest.approx(expected[1, 1] / expected[0, 0])
            assert wider.across == pytest.approx(found.across)
    np.testing.assert_allclose(
        landscape.surface("fp").loc[0.0, [0.0, 1.0]], [bowl.at(bowl.before), bowl.at(bowl.after)]
    )
    assert len(landscape.grid) == 9 * 9


@pytest.mark.parametrize("degrees", [-70, -20, 0, 35, 90])
def test_a_valley_has_its_direction(tmp_path: Path, degrees: float) -> None:
    bowl = Bowl()
    turn = np.array([[math.cos(math.radians(degrees))], [math.sin(math.radians(degrees))]])
    in_plane = turn @ turn.T + 50 * (np.eye(2) - turn @ turn.T)
    back = np.linalg.pinv(bowl.directions)  # H with dᵀHe = in_plane
    bowl.hessian = back @ in_plane @ back.T
    found = bowl.measured(tmp_path / GRID)
    difference = math.radians(found.summary["fp"]["after"]["valley_angle"] - degrees)
    assert math.sin(difference) == pytest.approx(0, abs=1e-6)  # -90° and 90° are one direction
    assert found.summary["fp"]["after"]["smoothness"] == pytest.approx(1)


def test_a_cusp_is_called_one(tmp_path: Path) -> None:
    """|y| has second differences 2/h: half as large at twice the spacing."""
    bowl = Bowl()

    def losses(weights: State, x: float) -> list[float]:
        y = bowl.plane.project(weights)[1]
        return [(x - 1) ** 2 + y**2, (x - 1) ** 2 + abs(y)]

    measure(bowl.plane, GRID_SIZE, losses, ["fp", "quantized"], tmp_path / GRID)
    found = Landscape({"views": ["fp", "quantized"], "bits": 2}, {}, pd.read_csv(tmp_path / GRID), None)
    assert found.summary["quantized"]["after"]["smoothness"] == pytest.approx(0.5)
    assert ["cusp" in sentence for sentence in found.findings] == [False, True, False]


def test_the_directions_are_orthogonal_and_of_one_length() -> None:
    bowl = Bowl(1)
    rows = np.stack([flat(bowl.plane.along), flat({name: bowl.plane.across(name) for name in SHAPES})])
    np.testing.assert_allclose(rows, bowl.directions, rtol=1e-12)
    np.testing.assert_allclose(rows @ rows.T, bowl.plane.norm**2 * np.eye(2), atol=1e-12)


def test_a_projection_is_the_least_squares_one() -> None:
    bowl = Bowl(2)
    weights = np.random.default_rng(3).normal(size=17)
    place, square, *_ = np.linalg.lstsq(bowl.directions.T, weights - bowl.before, rcond=None)
    found = bowl.plane.project(as_state(weights))
    np.testing.assert_allclose(found, [*place, math.sqrt(square[0]) / bowl.plane.norm], rtol=1e-10)
    np.testing.assert_allclose(bowl.plane.project(as_state(bowl.after)), [1, 0, 0], atol=1e-7)


def test_no_plane_is_spanned() -> None:
    bowl = Bowl()
    before, after = as_state(bowl.before), as_state(bowl.after)
    with pytest.raises(UserError, match="AFTER"):
        Plane.through(before, before, after)
    with pytest.raises(UserError, match="along the line"):
        Plane.through(before, after, as_state(3 * (bowl.before - bowl.after)))


@pytest.mark.parametrize("cut", [0, 3, 30])
def test_a_stop_changes_nothing(tmp_path: Path, cut: int) -> None:
    """Killed after 30 points, and in the middle of a line; points that exist are not measured again."""
    bowl = Bowl()
    bowl.measured(tmp_path / GRID)
    undisturbed = (tmp_path / GRID).read_bytes()
    kept = undisturbed.splitlines(keepends=True)[:31]
    file, views = tmp_path / "stopped.csv", ["fp", "quantized"]
    file.write_bytes(b"".join(kept)[: -cut or None])
    seen: list[int] = []
    measure(bowl.plane, GRID_SIZE, bowl.losses, views, file, seen.append)
    assert file.read_bytes() == undisturbed
    assert seen == list(range(29 if cut else 30, 82))
    with pytest.raises(UserError, match="other points"):
        measure(bowl.plane, Grid(5, 0.5), bowl.losses, views, file)


# --- a real run ---

TOKENS = 1024
STEPS, SWITCH = 12, 6


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps, the last six in 2 bits, with a checkpoint after each."""
    output = tmp_path_factory.mktemp("landscape")
    overrides = [
        "name=two", f"output={output}", f"data.path={prepared}", "tokens=3072", "qat.scheme=fused", "qat.bits=2",
        "qat.fraction=0.5", "schedule.warmup_tokens=512", "evaluation.tokens=512", "evaluation.ptq_bits=[]",
        "tracking.uri=none", "checkpoint.interval=256", "checkpoint.keep=20", "checkpoint.background=false",
    ]  # fmt: skip
    train(load_run_config("debug", overrides))
    return output / "two"


def measured(run: Path, out: Path, *more: str) -> tuple[int, str, str]:
    words = ["landscape", f"{run}@{SWITCH}", str(run), "--out", str(out), "--resolution", "1", "--tokens", str(TOKENS)]
    return run_command([*words, *more])


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "landscape"
    code, output, error = measured(run, out, "--path", str(run))
    assert code == 0, error
    assert "18 points x 2 views" in output
    return out


def test_the_ends_have_the_losses_of_the_checkpoints(run: Path, folder: Path) -> None:
    """At before the quantized view is that of the first quantized step: with the scales that the switch sets."""
    found = read_landscape(folder)
    ends = {view: found.surface(view).loc[0.0, [0.0, 1.0]].tolist() for view in found.views}
    _, _, after = evaluate_checkpoint(str(run), tokens=TOKENS)
    config, reader = open_checkpoint(f"{run}@{SWITCH}", [f"evaluation.tokens={TOKENS}"])
    model, plugin = load_checkpointed_model(reader, config, torch.device("cpu"))
    held_out = open_validation(config)

    def loss() -> float:
        total, count = summed_loss(model, held_out, torch.device("cpu"), 0, 1)
        return total / count

    before = {"fp": loss()}
    plugin.maybe_switch(SWITCH, PlainMasters(torch.optim.AdamW(model.parameters())))
    before["quantized"] = loss()
    assert ends == {view: pytest.approx([before[view], after[view]], rel=1e-6) for view in ("fp", "quantized")}
    path = found.path
    assert path is not None
    assert path["step"].tolist() == list(range(SWITCH + 1, STEPS + 1))
    np.testing.assert_allclose(path.iloc[-1][["x", "y", "distance"]].astype(float), [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(path.iloc[-1][["fp", "quantized"]].astype(float), [after["fp"], after["quantized"]])
    assert (path["distance"].iloc[:-1] > 0.01).all()


def test_the_second_axis_is_the_step_that_adam_took(run: Path) -> None:
    """Between two neighbouring checkpoints AdamW decays the weights and adds the rate times this step."""
    config, reader = open_checkpoint(f"{run}@{SWITCH}")
    _, earlier = open_checkpoint(f"{run}@{SWITCH - 1}")
    last = build_timeline(config).at(SWITCH - 1)
    step = adam_step(config, reader)
    for name in ("embed.weight", "blocks.0.mlp.down.weight", "norm.weight"):
        decay = 0.0 if name == "norm.weight" else last.weight_decay
        start = earlier.parameter(name) * (1 - last.learning_rate * decay)
        moved = reader.parameter(name) - start
        torch.testing.assert_close(moved, last.learning_rate * step(name), rtol=1e-3, atol=3e-7)


def test_a_stopped_command_continues_to_the_same_bits(run: Path, folder: Path, tmp_path: Path) -> None:
    undisturbed = (folder / GRID).read_bytes()
    lines = undisturbed.splitlines(keepends=True)
    (tmp_path / "landscape.json").write_bytes((folder / "landscape.json").read_bytes())
    (tmp_path / GRID).write_bytes(b"".join(lines[:6]) + b"1.0,")
    code, _, error = measured(run, tmp_path)
    assert code == 0, error
    assert (tmp_path / GRID).read_bytes() == undisturbed
    assert {"landscape.png", "landscape.svg"} <= {path.name for path in tmp_path.iterdir()}
    known = json.loads((tmp_path / "landscape.json").read_text())
    assert known["summary"] == json.loads((folder / "landscape.json").read_text())["summary"]


@pytest.mark.parametrize(
    ("more", "named"),
    [(["--resolution", "2"], "resolution"), (["--across", "0.1"], "across"), (["--tokens", "512"], "tokens"),
     (["--view", "fp"], "views")],
)  # fmt: skip
def test_other_inputs_are_refused(run: Path, folder: Path, more: list[str], named: str) -> None:
    code, _, error = measured(run, folder, *more)
    assert code == 2
    assert f"begun with {named}" in error


def test_checkpoints_that_do_not_go_together_are_refused(run: Path, tmp_path: Path) -> None:
    for words, named in (
        ([f"{run}@{SWITCH}", f"{run}@{SWITCH}"], "AFTER"),
        ([f"{run}@3", f"{run}@5", "--view", "quantized"], "--view"),
        ([f"{run}@{SWITCH}", str(run), "--path", str(tmp_path)], "--path"),
        ([f"{run}@{SWITCH}", str(run), "--across", "0"], "--across"),
    ):
        code, _, error = run_command(["landscape", *words, "--out", str(tmp_path / "out"), "--tokens", "64"])
        assert (code, named in error) == (2, True), error


def test_a_report_shows_it(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("scheme,bits,n_params,tokens_fp,tokens_qat,loss\nfp,16,86304,2300000,0,3.887\n")
    words = ["report", "--table", str(table), "--landscape", str(folder), "--out", str(tmp_path / "report")]
    code, _, error = run_command(words)
    assert code == 0, error
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"The loss around a cooldown: two@{SWITCH} to two@{STEPS}" in page
    assert all((tmp_path / "report" / "figures" / f"landscape_1.{ending}").is_file() for ending in ("png", "svg"))
    (folder / "landscape.json").replace(tmp_path / "landscape.json")
    code, _, error = run_command(words)
    (tmp_path / "landscape.json").replace(folder / "landscape.json")
    assert (code, "cannot be read" in error) == (2, True)
