"""Masters and checkpoints under ZeRO 1, 2 and 3 on two processes, with sizes that do not halve (masters_driver.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qatscale.engine.checkpoints.reader import CheckpointReader
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.reference import encode
from tests.processes import run

DRIVER = Path(__file__).with_name("masters_driver.py")
LAYOUTS = [f"{stage}-{precision}-None" for stage in (1, 2) for precision in ("fp32", "bf16")] + [
    f"3-{precision}-{threshold}" for precision in ("fp32", "bf16") for threshold in (0, 100_000)
]
SHAPES = {
    "norm": [5], "gain": [1],
    "up.weight": [5, 7], "up.weight_scale": [5], "down.weight": [3, 5], "down.weight_scale": [3],
}  # fmt: skip
SCALES = {"up.weight_scale", "down.weight_scale"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("masters")
    finished = run([DRIVER, folder], ranks=2)
    assert finished.codes == [0, 0], finished.output
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def initial() -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(SHAPES[name], generator=generator) for name in ("up.weight", "down.weight")}
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items() if name not in drawn}
    return {name: value.flatten().tolist() for name, value in (drawn | ones).items()}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_gives_every_process_the_whole_master(layout: str, seen: list[dict[str, Any]]) -> None:
    """Also in bf16, where the master is made of the rounded weights."""
    expected = initial()
    if "bf16" in layout:
        expected = {name: torch.tensor(v).bfloat16().float().tolist() for name, v in expected.items()}
    for rank in seen:
        assert rank["masters"][layout]["shapes"] == SHAPES
        assert rank["masters"][layout]["initial"] == expected


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_assigned_value_is_master_at_once_and_what_forward_sees(layout: str, seen: list[dict[str, Any]]) -> None:
    values = {n: torch.arange(torch.Size(s).numel()).view(s) / 64 + 0.25 for n, s in SHAPES.items()}
    for rank, own in enumerate(seen):
        found = own["masters"][layout]
        assert found["assigned"] == {name: value.flatten().tolist() for name, value in values.items()}
        x = torch.randn(1, 7, generator=torch.Generator().manual_seed(70 + rank))
        hidden = torch.tanh(x @ values["up.weight"].T) * values["norm"]
        expected = float(((hidden @ values["down.weight"].T) * values["gain"]).square().mean())
        assert found["loss after assign"] == pytest.approx(expected, rel=3e-2 if "bf16" in layout else 1e-5)
        assert abs(found["loss before assign"] / expected - 1) > 0.1, "assigning changes the loss"
        assert found["wrong shape"] == "norm has shape (5,), the value (4,)"


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reset_state_is_for_the_scales_alone(layout: str, seen: list[dict[str, Any]]) -> None:
    held = set()
    for rank in seen:
        found = rank["masters"][layout]
        held |= found["adam before"].keys()
        assert all(value == [0, 0] for value in found["adam before"].values())
        assert all(steps == 2 for steps, _ in found["adam after"].values())
        for name, (steps, moments) in found["adam reset"].items():
            assert (steps, moments) == ((0, 0) if name in SCALES else tuple(found["adam after"][name]))
            assert name in SCALES or moments > 0
    assert held == SHAPES.keys(), "every parameter is on some process"


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_at_the_floor_and_codes_that_flip_are_counted_on_whole_matrices(
    layout: str, seen: list[dict[str, Any]]
) -> None:
    """Over both processes; the codes on the middle half of the rows: 2 of 5 from the second, 2 of 3 from the first."""
    dtype = torch.bfloat16 if "bf16" in layout else torch.float32
    drawn = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        order = seen[0]["masters"][layout]["shapes"]
        drawn.append({n: torch.randn(SHAPES[n], generator=generator) + 0.5 * n.endswith("_scale") for n in order})
    codes = [
        [
            encode(get_quantizer(3), values[f"{name}.weight"].to(dtype), values[f"{name}.weight_scale"].to(dtype))[rows]
            for name, rows in (("up", slice(1, 3)), ("down", slice(0, 2)))
        ]
        for values in drawn
    ]
    flips = sum(int((new != old).sum()) for old, new in zip(*codes, strict=True))
    floored = sum(int((drawn[1][name] <= 1e-5).sum()) for name in SCALES)
    assert 0 < floored < 8
    assert 0 < flips < 2 * 7 + 2 * 5
    for key, expected in {"compared": [flips, 2 * 7 + 2 * 5], "alone": [0, 0]}.items():
        counts = torch.tensor([rank["masters"][layout]["codes"][key] for rank in seen])
        assert counts.sum(0).tolist() == [floored, 8, *expected]


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_one_stage_is_the_same_under_every_other(layout: str, seen: list[dict[str, Any]]) -> None:
    """Saved under ZeRO-1; loaded and saved again under `layout`: masters and Adam states bit for bit."""
    entry = seen[0]["cross"][layout.split("-")[1]]
    loaded = entry["loaded"][layout]
    assert loaded["same masters"]
    first, second = CheckpointReader(Path(entry["saved"])), CheckpointReader(Path(loaded["again"]))
    assert {record.adam_steps for record in first.manifest.parameters.values()} == {3}
    assert second.manifest.parameters == first.manifest.parameters
    for name in SHAPES:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(first.parameter(name, kind), second.parameter(name, kind)), f"{kind} of {name}"
    assert any(first.parameter(name, "exp_avg").abs().sum() > 0 for name in SHAPES)
    same_layout = layout.startswith("1")
    assert loaded["losses"] == (
        entry["losses"] if same_layout else pytest.approx(entry["losses"], rel=1e-2 if "bf16" in layout else 1e-5)
    )


@pytest.mark.dist
@pytest.mark.parametrize("victim", ["rank 0", "rank 1"])
def test_a_full_disk_on_one_process_is_raised_on_all(victim: str, seen: list[dict[str, Any]]) -> None:
    told = {rank["failing"][victim] for rank in seen}
    assert len(told) == 1
    message = told.pop()
    assert message.startswith("the checkpoint of step 2 was not written: ")
    assert f"process {victim[-1]}: " in message
    assert "File too large" in message


@pytest.mark.dist
def test_a_failed_save_leaves_the_checkpoint_before_and_nothing_else(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "process 0: " in rank["failing"]["blocked"]
        assert rank["failing"]["left"] == ["blocked", "step-00000001"]
        assert rank["failing"]["found then"] == ["step-00000001", "step-00000002"]


@pytest.mark.dist
def test_damage_that_one_process_finds_is_raised_on_all(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "shard-00001-of-00002.safetensors was altered" in rank["damaged"]
        assert "one before it is step-00000001 (not verified): give" in rank["damaged"]


@pytest.mark.dist
def test_a_copy_that_another_process_saves_has_to_be_finite(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["poisoned"].startswith("the checkpoint of step 4 was not written: exp_avg_sq/")
