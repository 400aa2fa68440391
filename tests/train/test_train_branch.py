"""A branch is its parent up to its start, and from there a run of its own."""

from __future__ import annotations

import json

import pytest

from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.components import ResumePlan
from qatscale.train.resume import places, plan_resume
from tests.train.driving import STEPS, SWITCH, assert_same_state, config, losses
from tests.train.trained_runs import REFERENCE, Trained

AFTER = range(SWITCH + 1, STEPS + 1)


def plan(trained: Trained, origin: str, *overrides: str) -> ResumePlan | None:
    """How a new run would begin at `origin`, a name of a run and a step."""
    new = config(trained.spec("new"), *overrides)
    return plan_resume(new, build_timeline(new), f"{trained.runs}/{origin}")


@pytest.mark.dist
def test_trunk_and_branch_are_the_run_in_one_piece_bit_for_bit(trained: Trained) -> None:
    """The trunk is full precision, 16 steps long, and names other bits; the branch switches where it starts."""
    whole, trunk, branch = (losses(trained.runs / name) for name in (REFERENCE, "trunk", "branch"))
    assert [trunk[step] for step in range(1, SWITCH + 1)] == [whole[step] for step in range(1, SWITCH + 1)]
    assert branch == {step: whole[step] for step in AFTER}
    assert trunk[STEPS] != whole[STEPS]
    assert_same_state(find_checkpoint(trained.runs / "branch"), find_checkpoint(trained.runs / REFERENCE))
    finals = [RunFolder(trained.runs / name).final for name in ("branch", REFERENCE)]
    own_to_each = {"tokens_per_second_fp", "tokens_per_second_qat"}
    one, other = ({k: v for k, v in (final or {}).items() if k not in own_to_each} for final in finals)
    assert one == other


@pytest.mark.dist
def test_a_branch_may_have_another_layout(trained: Trained) -> None:
    whole = losses(trained.runs / REFERENCE)
    assert losses(trained.runs / "branch-p2") == pytest.approx({step: whole[step] for step in AFTER}, rel=1e-5)


@pytest.mark.dist
def test_a_branch_before_the_switch_may_quantize_fewer_layers_than_its_trunk_was_prepared_for(trained: Trained) -> None:
    whole = losses(trained.runs / "fused2e16-p2-z2-m4")  # embedding in 16 bits: no scales there
    assert losses(trained.runs / "branch-e16") == pytest.approx({step: whole[step] for step in AFTER}, rel=1e-5)


@pytest.mark.dist
def test_a_branch_after_the_switch_keeps_its_scales_and_changes_the_schedule(trained: Trained) -> None:
    whole, tail = losses(trained.runs / REFERENCE), losses(trained.runs / "tail")
    assert list(tail) == [10, 11, 12]
    assert [tail[10], tail[11]] == [whole[10], whole[11]], "both cooldowns begin at the full rate"
    assert tail[12] != whole[12]
    assert RunFolder(trained.runs / "tail").records("switch") == []


@pytest.mark.dist
def test_a_branch_may_change_the_mixture_of_its_cooldown(trained: Trained) -> None:
    """Only the mixture up to the branch decides where the sources continue; the trunk has none."""
    mixed = plan(trained, f"trunk@{SWITCH}", "data.mix={web: 1}")
    assert mixed is not None
    assert any("another mixture up to the branch" in notice for notice in mixed.notices)
    first, other = (config(trained.spec("new"), "data.mix={a: 1}", f"data.cooldown_mix={{{b}: 1}}") for b in "ab")
    reads = [places(run, build_timeline(run), SWITCH) for run in (first, other)]
    assert reads == [{"a": SWITCH * first.batch.sequences}] * 2
    after = [places(run, build_timeline(run), SWITCH + 1) for run in (first, other)]
    assert after[0] != after[1]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "parent", "step"),
    [("branch", "trunk", SWITCH), ("branch-p2", "trunk", SWITCH), ("tail", REFERENCE, STEPS - 3)],
)
def test_a_branch_records_its_parent(name: str, parent: str, step: int, trained: Trained) -> None:
    run = json.loads((trained.runs / name / "run.json").read_text())
    assert run["parent"] == {"name": parent, "folder": str((trained.runs / parent).resolve()), "step": step}
    assert RunFolder(trained.runs / parent).run["parent"] is None


@pytest.mark.dist
def test_another_data_seed_is_another_order_and_says_so(trained: Trained) -> None:
    branch, other = losses(trained.runs / "branch"), losses(trained.runs / "branch-seed")
    assert all(abs(other[step] - branch[step]) > 1e-4 for step in AFTER)
    notice = "note: another data.seed: the tail may show sequences again"
    assert trained.output[1].count(notice) == 1
    assert notice not in trained.output[2]


REFUSED = [
    # from, overrides, the key that is wrong, what the message says
    (f"trunk@{SWITCH}", ["model.layers=3"], "model.layers", "keeps its parent's model, which is 2"),
    (f"trunk@{SWITCH}", ["model.norm_eps=1e-6"], "model.norm_eps", "which is 1e-05"),
    (f"trunk@{SWITCH}", ["data.sequence_length=32"], "data.sequence_length", "which is 64"),
    (f"trunk@{SWITCH}", ["batch.sequences=16"], "batch.sequences", "which is 8"),
    ("trunk@16", [], "branch", "step 16 is not before the end of this run, 12 steps"),
    ("trunk@16", ["tokens=10240", "qat.fraction=0.5"], "branch", "step 16 lies after this run's switch at step 10"),
    ("trunk@7", ["qat.scheme=scratch", "qat.fraction=auto"], "branch", "Set qat.scheme=sequential and qat.fraction"),
    (f"{REFERENCE}@9", ["qat.bits=4"], "qat.bits", "the checkpoint's scales are for 2"),
    (f"{REFERENCE}@9", ["qat.group_size=32"], "qat.group_size", "the checkpoint's scales are for None"),
    (f"{REFERENCE}@9", ["qat.embedding_bits=8"], "qat.embedding_bits", "the checkpoint's scales are for 'auto'"),
    (f"{REFERENCE}@9", ["qat.scheme=fp", "qat.fraction=auto"], "branch", "this run never switches"),
    (f"{REFERENCE}@9", ["tokens=10240", "qat.fraction=0.5"], "branch", "this run switches at step 10"),
    ("trunk@5", [], "checkpoint", "no checkpoint at step 5; there are: 7, 16"),
    ("nothing", [], "checkpoint", "no run folder with a complete checkpoint"),
]  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize(("origin", "overrides", "key", "says"), REFUSED)
def test_refusals(origin: str, overrides: list[str], key: str, says: str, trained: Trained) -> None:
    with pytest.raises(UserError) as caught:
        plan(trained, origin, *overrides)
    assert caught.value.key == key
    assert says in str(caught.value)
    assert not (trained.runs / "new").exists(), "nothing is left of a run that was refused"


@pytest.mark.dist
def test_what_a_refusal_advises_is_accepted(trained: Trained) -> None:
    longer = ["tokens=10240", "schedule.cooldown_fraction=0.1"]
    with pytest.raises(UserError) as caught:
        plan(trained, "trunk@16", *longer, "qat.fraction=0.5")
    assert "qat.fraction <= 0.2" in caught.value.fix
    start = plan(trained, "trunk@16", *longer, "qat.fraction=0.2")
    assert start is not None
    assert start.step == 16


@pytest.mark.dist
def test_a_schedule_that_differs_before_the_branch_is_told(trained: Trained) -> None:
    same, other = plan(trained, f"trunk@{SWITCH}"), plan(trained, f"trunk@{SWITCH}", "optimizer.learning_rate=1e-3")
    assert same is not None
    assert same.notices == ()
    assert other is not None
    assert "schedule is not its parent's up to the branch" in other.notices[0]
