"""Averages of checkpoints against closed forms, and those of a study's branches against models built by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qatlaw.names import AVERAGED, FIRST_STEP, VAL_LOSS, VAL_LOSS_FP, VAL_LOSS_PTQ
from qatlaw.results import read_results
from qatlaw.runs import RunRecord
from qatscale.config.recipe import load_run_config
from qatscale.engine.checkpoints.manifest import ParameterRecord
from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint
from qatscale.engine.checkpoints.training_state import Skeleton, TrainingState, write_state
from qatscale.errors import UserError
from qatscale.quant.bit_widths import SCALE_FLOOR
from qatscale.study.average import average, average_study, checkpoints_of, geometric_mean, mean
from qatscale.study.file import read_study
from qatscale.study.folder import StudyFolder
from qatscale.study.grid import grid
from qatscale.study.lay_out import lay_out, record_rows
from qatscale.tracking.convert import write_run
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.evaluate import evaluate_checkpoint
from tests.study import studies

SMALL = ["model.layers=1", "model.hidden_size=32", "model.intermediate_size=64"]
FUSED = ["qat.scheme=fused", "qat.bits=2", "qat.fraction=0.5"]


def values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A weight near 1 (norms) or small, or a scale, some of it under its floor."""
    drawn = torch.from_numpy(np.random.default_rng([seed, *name.encode()]).standard_normal(shape)).float()
    if name.endswith(".weight_scale"):
        return (0.05 * (0.3 * drawn).exp()).masked_fill(drawn > 1.5, -0.01)
    return 1 + 0.1 * drawn if len(shape) == 1 else 0.05 * drawn


def state_of(seed: int, step: int, *overrides: str, switched: bool = True, data: Path | None = None) -> TrainingState:
    """Made-up weights after `step` steps of recipe `debug`, quantized at 2 bits where it has switched."""
    own = ["name=x", *SMALL, *(FUSED if switched else ["qat.scheme=fp"]), f"data.path={data or 'null'}", *overrides]
    config = load_run_config("debug", own)
    bones = Skeleton(config)
    digests = dict.fromkeys(bones.plugin["bits"], "at-switch")
    plugin = bones.plugin | ({"switched_at": 1, "scales_at_switch": digests} if switched else {})
    return TrainingState(
        config, f"seed {seed}", step, "tokens", plugin, bones.shapes, dict.fromkeys(bones.shapes, 0),
        lambda _, name: values(name, bones.shapes[name], seed),
    )  # fmt: skip


def written(out: Path, *states: TrainingState) -> Path:
    """A run's folder with these checkpoints."""
    write_run(states[0], out)
    for state in states[1:]:
        write_state(state, out / "checkpoints", state.config)
    return out


def read(out: Path) -> dict[str, Tensor]:
    return CheckpointReader(find_checkpoint(out)).weights()


def test_weights_by_their_mean_and_scales_by_the_geometric_mean_of_what_forward_uses(tmp_path: Path) -> None:
    runs = [written(tmp_path / f"run{seed}", state_of(seed, 5)) for seed in range(3)]
    state = average([str(run) for run in runs], tmp_path / "mean")
    assert state.source.startswith("average of 3 checkpoints")
    found, singles = read(tmp_path / "mean"), [read(run) for run in runs]
    assert found.keys() == singles[0].keys()
    for name, value in found.items():
        stacked = torch.stack([single[name].double() for single in singles])
        if name.endswith(".weight_scale"):
            assert (stacked < 0).any(), "some lie under the floor"
            expected = stacked.clamp(min=SCALE_FLOOR).prod(0) ** (1 / 3)
        else:
            expected = stacked.mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    manifest = CheckpointReader(find_checkpoint(tmp_path / "mean")).manifest
    assert {record.adam_steps for record in manifest.parameters.values()} == {0}, "an average has no moments"
    assert isinstance(next(iter(manifest.parameters.values())), ParameterRecord)
    assert RunFolder.open(tmp_path / "mean").imported.startswith("average of 3")  # type: ignore[union-attr]


def test_a_scale_and_its_weight_in_other_units_have_the_same_average() -> None:
    """Scales that are factors of one another average as their exponents do; equal ones stay as they are."""
    torch.testing.assert_close(geometric_mean([torch.tensor([0.1]), torch.tensor([0.4])]), torch.tensor([0.2]).double())
    equal = torch.rand(7)
    assert mean([equal, equal, equal]).float().equal(equal)
    torch.testing.assert_close(geometric_mean([equal] * 3), equal.double(), rtol=1e-12, atol=0)


def test_a_window_is_all_checkpoints_in_a_range(tmp_path: Path) -> None:
    """In full precision the scales mean nothing yet: those of the latest checkpoint are kept."""
    states = [state_of(step, step, switched=False) for step in (4, 6, 8, 10)]
    run = written(tmp_path / "run", *states)
    assert [path.name for path in checkpoints_of(f"{run}@5-9")] == ["step-00000006", "step-00000008"]
    average([f"{run}@5-9", f"{run}@10"], tmp_path / "mean")
    found = read(tmp_path / "mean")
    for name, shape in states[0].shapes.items():
        stacked = torch.stack([values(name, shape, seed).double() for seed in (6, 8, 10)])
        expected = stacked[-1] if name.endswith(".weight_scale") else stacked.mean(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-9)
    assert find_checkpoint(tmp_path / "mean").name == "step-00000010"
    (run / "checkpoints/step-00000006/manifest.json").unlink()
    with pytest.raises(UserError, match="step-00000006': no complete checkpoint here"):
        average([f"{run}@5-9", f"{run}@10"], tmp_path / "half")


def test_what_has_no_average_is_refused(tmp_path: Path) -> None:
    two = written(tmp_path / "two", state_of(0, 5), state_of(1, 6))
    other = {
        "wider": state_of(0, 5, "model.intermediate_size=96"),
        "full": state_of(0, 5, switched=False),
        "four": state_of(0, 5, "qat.bits=4"),
    }
    runs = {name: str(written(tmp_path / name, state)) for name, state in other.items()}
    for sources, key, said in (
        ([f"{two}@5"], "checkpoint", "two checkpoints or more"),
        ([f"{two}@5", str(two), f"{two}@6"], "checkpoint", "named twice"),
        ([f"{two}@7-9"], "checkpoint", "no checkpoint from step 7 to 9; it has steps 5, 6"),
        ([f"{two}@5-6", runs["wider"]], "model.intermediate_size", "96"),
        ([f"{two}@5-6", runs["full"]], "checkpoint", "has not switched to QAT"),
        ([f"{two}@5-6", runs["four"]], "checkpoint", "bits or groups"),
        ([str(tmp_path / "none")], "checkpoint", "does not exist"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            average(sources, tmp_path / "mean")
        assert caught.value.key == key
        assert not (tmp_path / "mean").exists()
    with pytest.raises(UserError, match="exists"):
        average([f"{two}@5-6"], two)


def test_a_studys_branches_and_ends_are_averaged_once(prepared: Path, tmp_path: Path) -> None:
    """Losses in all views equal those of the models averaged by hand."""
    file = studies.write_study(
        tmp_path / "tiny.yaml", prepared, fractions="[0.5]", bits="[2]", schemes="[fused]", keep_at="[]",
        grids="[{cooldown_data_seeds: [0, 1]}, {vary: {schedule.cooldown_fraction: [0]}, keep_at: [7_680, 9_216]}]",
    )  # fmt: skip
    folder = StudyFolder(tmp_path / "study")
    lay_out(file, folder)
    states: dict[tuple[str, int], TrainingState] = {}
    for seed, run in enumerate(grid(read_study(file)).runs):
        name, job = run.route.name, folder.jobs[run.route.name]
        for number, step in enumerate((*job.stay, job.steps)):
            own = [f"schedule.cooldown_fraction={run.config.schedule.cooldown_fraction}", "evaluation.tokens=2048"]
            states[name, step] = state_of(10 * seed + number, step, "tokens=10240", *own, data=prepared)
        written(folder.runs / name, *(state for (owner, _), state in states.items() if owner == name))
        final = {
            "scheme": "fused", "bits": 2, "n_params": 99, "tokens_total": run.timeline.tokens, "qat_fraction": 0.5,
            VAL_LOSS: 5.0,
        }  # fmt: skip
        recipe = {"data.cooldown_seed": str(run.config.data.cooldown_seed), "schedule.cooldown_fraction": own[0][-3:]}
        record_rows(folder, [RunRecord(name, name, "FINISHED", final, recipe)])
    said: list[str] = []
    assert average_study(folder, said.append) == 3
    first, other, ending = folder.jobs
    expected = {
        f"{first}-mean2": [(first, 40), (other, 40)],
        f"{ending}-last2": [(ending, 36), (ending, 40)],
        f"{ending}-last3": [(first, 30), (ending, 36), (ending, 40)],  # step 30 is its trunk's
    }
    rows = {row.name: row for row in read_results(folder.results)}
    assert rows.keys() == {first, other, ending, *expected}
    for name, members in expected.items():
        final = rows[name].final
        assert (final[AVERAGED], final[FIRST_STEP], final["scheme"]) == (len(members), members[0][1], "fused")
        by_hand = written(tmp_path / "by-hand" / name, states[members[-1]])
        average([f"{folder.runs / owner}@{step}" for owner, step in members], tmp_path / "again" / name)
        _, _, losses = evaluate_checkpoint(str(tmp_path / "again" / name), [2])
        assert [final[VAL_LOSS], final[VAL_LOSS_FP], final[f"{VAL_LOSS_PTQ}2"]] == [
            losses["quantized"], losses["fp"], losses["ptq2"],
        ]  # fmt: skip
        _, _, single = evaluate_checkpoint(str(by_hand))
        assert single["quantized"] != losses["quantized"]
    assert average_study(folder, said.append) == 0, "what has its row is not made again"
    assert len(said) == 3
