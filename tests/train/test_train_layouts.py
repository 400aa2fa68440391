"""The same losses under every product of data, tensor and pipeline parallelism and ZeRO stage, through the switch; and
a checkpoint of any of them goes on under any other.

A few in every run of the suite; all of them with `-m slow`, whose record is analysis/benchmarks/layouts.md.
"""

from __future__ import annotations

from itertools import product

import pytest

from qatscale.engine.checkpoints.files import read_manifest
from qatscale.tracking.run_folder import RunFolder
from tests.train.driving import records
from tests.train.layout_runs import AFTER, KINDS, LAYOUTS, SAVED, SAVED_AT, LaidOut, resumed_name

FP32 = 1e-5
BF16 = 5e-4  # measured: 6e-5; bf16 rounds partial sums, so where sums are cut shows

MORE_BF16 = ("t2p2", "t2sz3", "t2z2offload")
SPLIT = [name for name, (processes, _) in LAYOUTS.items() if processes > 1 and not name.startswith("bf16")]
IN_SUITE = {
    "untied4-t2z3", "untied1-t2sz3", "tied2-p2", "tied2-d2t2sz3",
    "tied6-t2p2", "untied4-t2sp2", "tied6-p4",
}  # fmt: skip
GRID = [
    pytest.param(name, id=name, marks=[] if name in IN_SUITE else pytest.mark.slow)
    for name in (f"{kind}-{layout}" for kind, layout in product(KINDS, SPLIT))
]
RESUMED_IN_SUITE = {
    ("one", "t2z1", "after"), ("t2z1", "p2", "after"), ("p2", "one", "before"),
}  # fmt: skip
RESUMES = [
    pytest.param(source, target, when, id=f"{source}-to-{target}-{when}",
                 marks=[] if (source, target, when) in RESUMED_IN_SUITE else pytest.mark.slow)
    for source, target, when in product(SAVED, SAVED, SAVED_AT) if source != target
]  # fmt: skip


def needed(test: str, **parameters: str) -> set[str]:
    """The runs that one of the tests below looks at."""
    if "resume" in test:
        return {resumed_name(parameters["source"], parameters["target"], parameters["when"])}
    if "bf16" in test:
        return {f"tied2-{parameters['layout']}", "tied2-bf16-one"}
    return {parameters["name"], f"{parameters['name'].split('-')[0]}-one"}


@pytest.fixture(scope="session")
def laid_out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LaidOut:
    """The runs that the selected tests need, trained."""
    from tests.train.fixed_tokens import write_fixed_tokens

    folder = tmp_path_factory.mktemp("layouts")
    made = LaidOut(folder, write_fixed_tokens(folder / "data"))
    here = [item for item in request.session.items if "laid_out" in getattr(item, "fixturenames", ())]
    made.train({name for item in here for name in needed(item.name, **item.callspec.params)})  # type: ignore[attr-defined]
    return made


@pytest.mark.dist
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", GRID)
def test_losses_do_not_depend_on_the_layout(name: str, laid_out: LaidOut, record_property: object) -> None:
    reference = f"{name.split('-')[0]}-one"
    difference = laid_out.difference(name, reference)
    record_property("difference", difference)  # type: ignore[operator]
    assert difference < FP32
    assert laid_out.gradient_norm_difference(name, reference) < FP32
    for own, other in zip(records(laid_out.runs / name), records(laid_out.runs / reference), strict=True):
        assert own.get("scales_floored") == other.get("scales_floored")
        assert own.get("code_flips") == pytest.approx(other.get("code_flips"), abs=2e-5)  # some of 0.2M codes
    (switch,), (expected,) = (RunFolder(laid_out.runs / run).records("switch") for run in (name, reference))
    assert switch["step"] == expected["step"]
    for key in ("layers", "weights", "bytes", "left_out"):
        assert switch["report"][key] == expected["report"][key], "the report is of the whole model"


@pytest.mark.dist
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "layout",
    ["bf16-t2z1", "bf16-p2", *(pytest.param(f"bf16-{x}", marks=pytest.mark.slow) for x in MORE_BF16)],
)
def test_bf16_losses_follow_those_of_one_process(layout: str, laid_out: LaidOut, record_property: object) -> None:
    difference = laid_out.difference(f"tied2-{layout}", "tied2-bf16-one")
    record_property("difference", difference)  # type: ignore[operator]
    assert difference < BF16


@pytest.mark.dist
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("source", "target", "when"), RESUMES)
def test_a_checkpoint_is_resumed_under_another_layout(
    source: str, target: str, when: str, laid_out: LaidOut, record_property: object
) -> None:
    name = resumed_name(source, target, when)
    folder = RunFolder(laid_out.runs / name)
    steps = [record["step"] for record in folder.records("metrics")]
    assert steps == list(range(SAVED_AT[when] + 1, SAVED_AT[when] + len(steps) + 1))
    assert len(steps) >= AFTER
    difference = laid_out.difference(name, "long-one")
    record_property("difference", difference)  # type: ignore[operator]
    assert difference < FP32
    # what the checkpoint at the end knows of the plugin is of the whole model, whatever stages it was saved by
    ends = [read_manifest(RunFolder(laid_out.runs / run).checkpoints / "step-00000032") for run in (name, "long-one")]
    assert ends[0].plugin["bits"] == ends[1].plugin["bits"]
    assert ends[0].plugin["scales_at_switch"].keys() == ends[1].plugin["scales_at_switch"].keys()
    assert ends[0].parameters == ends[1].parameters
