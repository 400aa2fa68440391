"""The four schemes against timelines worked out by hand, and against each other."""

import math
import subprocess
import sys

import pytest

from qatscale.config.recipe import load_run_config, recipe_names
from qatscale.config.schema import RunConfig
from qatscale.schedule.build import build_timeline
from qatscale.schedule.rates import qat_lr_ratio
from tests.schedule.schedule_configs import PARAMETERS, TOKENS_PER_STEP, make_config

LINEAR = {"warmup_fraction": 0.1, "cooldown_fraction": 0.2, "shape": "linear"}


def phases(timeline):
    return [(segment.phase, segment.start, segment.end, segment.quantized) for segment in timeline.segments]


def rates(timeline):
    return [timeline.at(step).learning_rate for step in range(timeline.steps)]


def test_fp():
    timeline = build_timeline(make_config(schedule=LINEAR))
    assert phases(timeline) == [("warmup", 0, 10, False), ("stable", 10, 80, False), ("cooldown", 80, 100, False)]
    assert timeline.switch_step is None
    assert timeline.qat_fraction == 0
    assert timeline.boundaries == (80,)
    by_hand = [1e-4 * (i + 1) for i in range(10)] + [1e-3] * 70 + [1e-3 * (1 - i / 20) for i in range(20)]
    assert rates(timeline) == pytest.approx(by_hand, rel=1e-12)
    assert timeline.warnings == ()


def test_warmup_ends_and_cooldown_starts_exactly_at_the_peak():
    timeline = build_timeline(make_config(schedule={"warmup_fraction": 0.07, "min_lr_ratio": 0.1}))
    exact = [timeline.at(step).learning_rate for step in (6, 7, 79, 80)]
    assert exact == [1e-3] * 4
    assert timeline.at(81).learning_rate < 1e-3
    assert timeline.at(99).learning_rate > 1e-4, "the floor is reached after the last step, not on it"


def test_defaults_are_one_percent_warmup_and_twenty_percent_1_sqrt():
    timeline = build_timeline(make_config(steps=1000))
    assert phases(timeline) == [("warmup", 0, 10, False), ("stable", 10, 800, False), ("cooldown", 800, 1000, False)]
    assert timeline.at(850).learning_rate == pytest.approx(1e-3 * 0.5, rel=1e-12)


def test_scratch_is_fp_with_quantization_from_step_0():
    scratch = build_timeline(make_config(schedule=LINEAR, qat={"scheme": "scratch", "bits": 2}))
    assert phases(scratch) == [
        ("qat_warmup", 0, 10, True),
        ("qat_stable", 10, 80, True),
        ("qat_cooldown", 80, 100, True),
    ]
    assert scratch.switch_step == 0
    assert scratch.qat_fraction == 1
    assert scratch.boundaries == (80,), "there is nothing to keep before step 0"
    assert rates(scratch) == rates(build_timeline(make_config(schedule=LINEAR)))


def test_scratch_takes_the_qat_rate():
    scratch = build_timeline(make_config(qat={"scheme": "scratch", "learning_rate": 4e-4}))
    assert max(rates(scratch)) == 4e-4


@pytest.mark.parametrize("scheme", ["sequential", "fused", "scratch"])
def test_the_qat_rate_as_a_ratio(scheme):
    fraction = {} if scheme == "scratch" else {"fraction": 0.5}
    own = {"scheme": scheme, "bits": 2, **fraction}
    timelines = [
        build_timeline(make_config(qat=own | rate))
        for rate in ({"lr_ratio": 0.25}, {"learning_rate": 2.5e-4}, {"lr_ratio": "auto"}, {})
    ]
    auto = float(f"{12 ** -(1 - 0.5 / 0.7):.3g}") if scheme == "sequential" else 1.0
    assert [timeline.qat_lr_ratio for timeline in timelines] == [0.25, 0.25, auto, auto]
    peaks = [max(rates(timeline)[timeline.switch_step :]) for timeline in timelines]
    assert peaks == pytest.approx([2.5e-4, 2.5e-4, auto * 1e-3, auto * 1e-3], rel=1e-12)
    assert timelines[0].segments == timelines[1].segments
    assert timelines[0].to_dict()["qat_lr_ratio"] == 0.25


@pytest.mark.parametrize(
    ("bits", "fraction", "ratio"),
    [
        (1, 0.35, 0.5),
        (1, 0.7, 1),
        (1, 0.9, 1),
        (2, 0.35, 12**-0.5),
        (4, 0.35, 12**-0.5),
        (1.58, 0.35, 0.75**0.5 * 3**-0.79),
    ],
)
def test_the_measured_rule(bits, fraction, ratio):
    """a_B^(1 - f/0.7), by hand: half of the way to 0.7 is the root of a_B."""
    assert qat_lr_ratio("sequential", bits, fraction) == pytest.approx(ratio, rel=2e-3)
    assert qat_lr_ratio("fused", bits, fraction) == qat_lr_ratio("scratch", bits, 1.0) == 1


def test_auto_follows_the_rule(monkeypatch):
    """Whatever the rule says of (scheme, bits, fraction) is the ratio, of the fraction that is run."""
    asked = []
    monkeypatch.setattr("qatscale.schedule.rates.qat_lr_ratio", lambda *of: asked.append(of) or 0.5)
    timeline = build_timeline(make_config(steps=80, qat={"scheme": "fused", "bits": 8}))
    assert set(asked) == {("fused", 8, 0.2)}, "the optimum, 0.186, does not hold the cooldown of a fifth"
    assert max(rates(timeline)[64:]) == 5e-4
    assert build_timeline(make_config()).qat_lr_ratio is None


def test_sequential_is_two_schedules():
    qat = {"scheme": "sequential", "fraction": 0.4, "learning_rate": 5e-4, "warmup_fraction": 0.1}
    timeline = build_timeline(make_config(steps=200, schedule=LINEAR, qat=qat | {"cooldown_fraction": 0.5}))
    assert phases(timeline) == [
        ("warmup", 0, 12, False),
        ("stable", 12, 96, False),
        ("cooldown", 96, 120, False),
        ("qat_warmup", 120, 128, True),
        ("qat_stable", 128, 160, True),
        ("qat_cooldown", 160, 200, True),
    ]
    assert timeline.switch_step == 120
    assert timeline.boundaries == (96, 120, 160)
    by_hand = {0: 1e-3 / 12, 11: 1e-3, 96: 1e-3, 119: 1e-3 / 24, 120: 5e-4 / 8, 127: 5e-4, 160: 5e-4, 199: 5e-4 / 40}
    assert {step: timeline.at(step).learning_rate for step in by_hand} == pytest.approx(by_hand, rel=1e-12)


def test_sequential_defaults():
    timeline = build_timeline(make_config(steps=1000, qat={"scheme": "sequential", "fraction": 0.5, "lr_ratio": 1}))
    assert [end - start for _, start, end, _ in phases(timeline)] == [5, 395, 100, 10, 390, 100]
    assert timeline.at(999).learning_rate == timeline.at(499).learning_rate, "1 = optimizer.learning_rate"


def test_sequential_lengths_in_tokens_hold_for_both_phases_as_given():
    schedule = {"warmup_tokens": 3 * TOKENS_PER_STEP, "cooldown_tokens": 7 * TOKENS_PER_STEP}
    qat = {"scheme": "sequential", "fraction": 0.3, "warmup_tokens": 2 * TOKENS_PER_STEP}
    timeline = build_timeline(make_config(schedule=schedule, qat=qat))
    assert [end - start for _, start, end, _ in phases(timeline)] == [3, 60, 7, 2, 21, 7]


def test_fused_is_the_fp_curve_with_the_cooldown_inside_qat():
    config = make_config(schedule=LINEAR, qat={"scheme": "fused", "fraction": 0.35})
    timeline = build_timeline(config)
    assert phases(timeline) == [
        ("warmup", 0, 10, False),
        ("stable", 10, 65, False),
        ("qat_stable", 65, 80, True),
        ("qat_cooldown", 80, 100, True),
    ]
    assert timeline.boundaries == (65, 80)
    assert rates(timeline) == rates(build_timeline(make_config(schedule=LINEAR)))


def test_fused_cooldown_may_start_at_the_switch():
    timeline = build_timeline(make_config(schedule=LINEAR, qat={"scheme": "fused", "fraction": 0.2}))
    assert [phase for phase, *_ in phases(timeline)] == ["warmup", "stable", "qat_cooldown"]
    assert timeline.boundaries == (80,)


def test_fused_rewarmup_is_taken_out_of_the_stable_part_of_qat():
    qat = {"scheme": "fused", "fraction": 0.4, "warmup_fraction": 0.25}
    timeline = build_timeline(make_config(schedule=LINEAR, qat=qat))
    assert phases(timeline)[2:] == [
        ("qat_warmup", 60, 70, True),
        ("qat_stable", 70, 80, True),
        ("qat_cooldown", 80, 100, True),
    ]
    assert timeline.at(59).learning_rate == 1e-3
    assert timeline.at(60).learning_rate == pytest.approx(1e-4)
    assert timeline.at(69).learning_rate == 1e-3


def test_a_trunk_without_cooldown_and_without_warmup_is_one_segment():
    timeline = build_timeline(make_config(schedule={"warmup_fraction": 0, "cooldown_fraction": 0}))
    assert phases(timeline) == [("stable", 0, 100, False)]
    assert timeline.boundaries == ()


def test_auto_is_the_closed_form_with_all_parameters():
    steps, bits = 2000, 2
    S = steps * TOKENS_PER_STEP / (PARAMETERS * bits / 8)
    f = math.exp(-6.7297 / math.log(S))
    timeline = build_timeline(make_config(steps=steps, qat={"scheme": "sequential", "bits": bits}))
    assert timeline.planned_fraction == pytest.approx(f, rel=1e-12)
    assert timeline.switch_step == round((1 - f) * steps)
    assert timeline.qat_fraction == pytest.approx(f, abs=0.5 / steps)


def test_settings_of_adamw_per_phase():
    overrides = {"cooldown": {"betas": [0.9, 0.9]}, "qat_stable": {"weight_decay": 0.0, "betas": [0.8, 0.95]}}
    config = make_config(schedule={"phases": overrides}, qat={"scheme": "sequential", "fraction": 0.5})
    timeline = build_timeline(config)
    seen = {segment.phase: (segment.betas, segment.weight_decay) for segment in timeline.segments}
    plain = ((0.9, 0.95), 0.1)
    assert seen == {
        "stable": plain,
        "cooldown": ((0.9, 0.9), 0.1),
        "qat_warmup": plain,
        "qat_stable": ((0.8, 0.95), 0.0),
        "qat_cooldown": plain,
    } | ({"warmup": plain} if "warmup" in seen else {})
    at_switch = timeline.at(timeline.switch_step + 5)
    assert (at_switch.phase, at_switch.betas, at_switch.weight_decay) == ("qat_stable", (0.8, 0.95), 0.0)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_timeline(name):
    config = RunConfig.model_validate(load_run_config(name).model_dump())  # as if a person had set all of it
    timeline = build_timeline(config)
    assert timeline.steps == config.steps
    assert (timeline.switch_step is None) == (config.qat.scheme == "fp")
    # 8B and a thousandth of the study's sizes lie outside the measured ones.
    known = "extrapolation" if name in ("8b", "86k", "194k", "396k", "759k", "2p2m") else None
    unexpected = [line for line in timeline.warnings if known is None or known not in line]
    assert unexpected == [], "a shipped recipe sets nothing that has no effect"


@pytest.mark.parametrize("step", [-1, 100])
def test_no_step_outside_the_run(step):
    with pytest.raises(IndexError, match="100 steps"):
        build_timeline(make_config()).at(step)


def test_import_needs_no_torch_and_no_matplotlib():
    code = (
        "import sys, qatscale.schedule\n"
        "print(sorted({'torch', 'matplotlib', 'scipy', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
