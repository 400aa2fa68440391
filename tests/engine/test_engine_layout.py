"""Which layouts are planned, which are refused and why; how blocks are divided over stages."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest

from qatscale.config.ds_config import load_ds_config
from qatscale.config.recipe import load_run_config
from qatscale.config.sizes import count_parameters
from qatscale.engine.layout import Layout, Place, stages_of
from qatscale.engine.layout_plan import bubble, layout_notices, plan_layout
from qatscale.errors import UserError
from qatscale.model.stages import divide, stage_parameters

DEBUG = ["model.heads=4", "model.layers=4"]


def plan(processes: int, *overrides: str, ds_config: str = "zero1_fp32") -> Layout:
    return plan_layout(load_run_config("debug", [*DEBUG, *overrides]), load_ds_config(ds_config), processes)


def test_the_rest_of_the_processes_is_data_parallel() -> None:
    assert plan(4) == Layout(4, 1, 1)
    assert plan(8, "engine.tensor_parallel=2") == Layout(4, 2, 1)
    assert plan(8, "engine.tensor_parallel=2", "engine.pipeline_stages=2") == Layout(2, 2, 2)


def test_every_rank_has_a_place_of_its_own_and_tensor_neighbours_are_next_to_each_other() -> None:
    layout = Layout(2, 3, 4)
    places = [layout.place(rank) for rank in range(layout.processes)]
    assert len(set(places)) == 24
    assert places[:4] == [Place(0, 0, 0), Place(0, 0, 1), Place(0, 0, 2), Place(0, 1, 0)]
    assert places[6] == Place(1, 0, 0)


@pytest.mark.parametrize(
    ("processes", "overrides", "ds_config", "told"),
    [
        (3, ["engine.tensor_parallel=2"], "zero1_fp32", ["multiple of", "2 x 1", "Start 2 or 4"]),
        (1, ["engine.pipeline_stages=2"], "zero1_fp32", ["Start 2."]),
        (3, ["engine.tensor_parallel=3"], "zero1_fp32", ["model.heads = 4", "1, 2, 4", "model.heads=3 or 6"]),
        (4, ["engine.tensor_parallel=4", "model.kv_heads=2"], "zero1_fp32", ["model.kv_heads = 2", "model.kv_heads=4"]),
        (2, ["engine.tensor_parallel=2", "model.intermediate_size=191"], "zero1_fp32",
         ["model.intermediate_size = 191", "190 or 192"]),
        (8, ["engine.pipeline_stages=8"], "zero1_fp32", ["more than model.layers = 4"]),
        (2, ["engine.pipeline_stages=2"], "zero2_fp32", ["ZeRO-1 alone", "stage 2"]),
        (2, ["engine.pipeline_stages=2"], "zero3_fp32", ["ZeRO-1 alone", "stage 3"]),
        (2, ["engine.pipeline_stages=2"], "offload.json", ["offload_optimizer", "part of the gradient"]),
        (1, ["engine.sequence_parallel=true"], "zero1_fp32", ["no effect without tensor"]),
        (2, ["engine.tensor_parallel=2", "engine.sequence_parallel=true", "data.sequence_length=63"], "zero1_fp32",
         ["data.sequence_length = 63", "62 or 64"]),
        (4, ["engine.tensor_parallel=4", "qat.group_size=32"], "zero1_fp32", ["qat.group_size", "= 16"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(
    processes: int, overrides: list[str], ds_config: str, told: list[str], tmp_path: Path
) -> None:
    if ds_config == "offload.json":
        ds_config = str(tmp_path / ds_config)
        Path(ds_config).write_text('{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}')
    with pytest.raises(UserError) as caught:
        plan(processes, *overrides, ds_config=ds_config)
    for part in told:
        assert part in str(caught.value)


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        plan(5, "engine.tensor_parallel=3", "engine.pipeline_stages=2", ds_config="zero3_fp32")
    assert str(caught.value).startswith("3 problems")


def test_the_vocabulary_is_padded_and_says_so() -> None:
    config = load_run_config("debug", [*DEBUG, "model.vocab_size=513", "engine.tensor_parallel=4"])
    (notice,) = layout_notices(config, Layout(1, 4, 1))
    assert "padded by 3" in notice
    assert layout_notices(load_run_config("debug", DEBUG), Layout(1, 4, 1)) == ()


def test_a_process_alone_on_a_host_of_gpus_says_what_would_use_all() -> None:
    config = load_run_config("debug", DEBUG)
    assert [len(layout_notices(config, Layout(data), gpus)) for data, gpus in ((1, 8), (1, 1), (8, 8), (1, 0))] == [
        1,
        0,
        0,
        0,
    ]
    (notice,) = layout_notices(config, Layout(), 8)
    assert "8 GPUs" in notice


def test_the_stages_and_the_bubble_are_told() -> None:
    config = load_run_config("debug", [*DEBUG, "batch.sequences=4", "batch.micro_batch=1", "engine.pipeline_stages=2"])
    (notice,) = layout_notices(config, Layout(1, 1, 2))
    assert "4 micro-batches" in notice
    assert "20%" in notice  # 1 / (4 + 1)


@pytest.mark.parametrize(("micro_batches", "stages"), [(1, 1), (4, 1), (8, 4), (3, 5)])
def test_the_bubble_by_counting_slots(micro_batches: int, stages: int) -> None:
    """A stage works on m of the m + p - 1 slots that a step takes, forward and backward alike."""
    finish = [[0] * stages for _ in range(micro_batches)]
    for m in range(micro_batches):
        for stage in range(stages):
            before = [finish[m - 1][stage]] if m else [0]
            before += [finish[m][stage - 1]] if stage else []
            finish[m][stage] = max(before) + 1
    slots = finish[-1][-1]
    assert bubble(micro_batches, stages) == pytest.approx(1 - micro_batches / slots)


@pytest.mark.parametrize("recipe", ["debug", "86m", "396m", "8b"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_division_has_a_smaller_largest_stage(recipe: str, count: int) -> None:
    model = load_run_config(recipe, ["model.layers=7"]).model
    stages = divide(model, count)
    assert [block for stage in stages for block in stage.blocks] == list(range(7))
    found = stage_parameters(model, [len(stage.blocks) for stage in stages])
    for cuts in combinations(range(1, 7), count - 1):
        edges = [0, *cuts, 7]
        other = stage_parameters(model, [b - a for a, b in pairwise(edges)])
        assert max(found) <= max(other)


@pytest.mark.parametrize("tied", [True, False])
def test_stages_together_are_the_model_and_a_tied_table_twice(tied: bool) -> None:
    config = load_run_config("debug", [*DEBUG, f"model.tied_embedding={tied}", "engine.pipeline_stages=3"])
    model = config.model
    table = model.vocab_size * model.hidden_size
    sizes = stage_parameters(model, [len(stage.blocks) for stage in stages_of(config)])
    assert sum(sizes) == count_parameters(model) + (table if tied else 0)
