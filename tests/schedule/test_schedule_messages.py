"""What a user reads: errors with the way out, and warnings for settings that do nothing or hardly what is meant."""

import math

import pytest

from qatscale.config.recipe import load_run_config
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from qatscale.schedule.timeline import kept_steps
from tests.schedule.schedule_configs import PARAMETERS, TOKENS_PER_STEP, make_config

TWO_PHASES = [{"scheme": "sequential", "fraction": 0.5}, {"scheme": "fused", "fraction": 0.5}]


def error_of(**config):
    with pytest.raises(UserError) as caught:
        build_timeline(make_config(**config))
    return caught.value


@pytest.mark.parametrize("scheme", ["fp", "scratch"])
def test_warmup_and_cooldown_longer_than_the_run(scheme):
    schedule = {"warmup_fraction": 0.3, "cooldown_fraction": 0.8}
    error = error_of(schedule=schedule, qat={"scheme": scheme})
    assert (error.key, error.value) == ("schedule.cooldown_fraction", 0.8)
    assert "80 (schedule.cooldown_fraction)" in error.problem
    assert "30 (schedule.warmup_fraction)" in error.problem
    assert "the 100 steps of the run" in error.problem
    assert error.fix == "Set schedule.cooldown_fraction <= 0.7, or schedule.warmup_fraction <= 0.2."


def test_a_length_in_tokens_is_mended_in_tokens():
    error = error_of(schedule={"warmup_fraction": 0.1, "cooldown_tokens": 95 * TOKENS_PER_STEP})
    assert error.key == "schedule.cooldown_tokens"
    assert error.fix.startswith("Set schedule.cooldown_tokens <= 90000, or schedule.warmup_fraction <= 0.05")


def test_sequential_names_the_phase_that_is_too_short():
    schedule = {"cooldown_tokens": 20 * TOKENS_PER_STEP, "warmup_fraction": 0}
    qat = {"scheme": "sequential", "warmup_fraction": 0}
    assert (
        "the 10 steps of the full-precision phase" in error_of(schedule=schedule, qat=qat | {"fraction": 0.9}).problem
    )
    assert "the 10 steps of the QAT phase" in error_of(schedule=schedule, qat=qat | {"fraction": 0.1}).problem


def test_fused_cooldown_longer_than_qat_names_both_mends():
    schedule = {"warmup_fraction": 0.1, "cooldown_fraction": 0.2}
    error = error_of(schedule=schedule, qat={"scheme": "fused", "fraction": 0.15})
    assert (error.key, error.value) == ("schedule.cooldown_fraction", 0.2)
    assert "the 15 steps of the QAT phase" in error.problem
    assert error.fix == "Set schedule.cooldown_fraction <= 0.15, or qat.fraction >= 0.2."


def test_fused_rewarmup_counts_for_the_mends():
    # 20 steps of cooldown and a fifth of the phase: 25 steps are the shortest phase that holds both.
    qat = {"scheme": "fused", "fraction": 0.22, "warmup_fraction": 0.2}
    error = error_of(schedule={"cooldown_fraction": 0.2}, qat=qat)
    assert "20 (schedule.cooldown_fraction)" in error.problem
    assert "4 (qat.warmup_fraction)" in error.problem
    assert "schedule.cooldown_fraction <= 0.18" in error.fix
    assert "qat.warmup_fraction <= 0.0909," in error.fix  # 2 of 22 steps
    assert "qat.fraction >= 0.25" in error.fix


def test_a_mend_has_the_digits_it_needs():
    # Only a QAT phase of exactly 1,001 of 3,000 steps fits both; 0.334 would give it 1,002.
    schedule = {"warmup_tokens": 1999 * TOKENS_PER_STEP, "cooldown_tokens": 1001 * TOKENS_PER_STEP}
    error = error_of(steps=3000, schedule=schedule, qat={"scheme": "fused", "fraction": 0.1})
    assert "qat.fraction >= 0.3337." in error.fix
    mended = build_timeline(make_config(3000, schedule=schedule, qat={"scheme": "fused", "fraction": 0.3337}))
    assert mended.qat_steps == 1001


def test_fused_warmup_longer_than_the_full_precision_phase():
    schedule = {"warmup_fraction": 0.3, "cooldown_fraction": 0.2}
    error = error_of(schedule=schedule, qat={"scheme": "fused", "fraction": 0.8})
    assert error.key == "schedule.warmup_fraction"
    assert error.fix == "Set schedule.warmup_fraction <= 0.2, or qat.fraction <= 0.7."


@pytest.mark.parametrize(
    ("schedule", "key", "least"),
    [
        ({"cooldown_fraction": 0.001}, "schedule.cooldown_fraction", "0.01"),
        ({"cooldown_tokens": 400}, "schedule.cooldown_tokens", "1000"),
        ({"warmup_fraction": 0.001}, "schedule.warmup_fraction", "0.01"),
        ({"warmup_tokens": 1}, "schedule.warmup_tokens", "1000"),
    ],
)
def test_a_length_that_was_asked_for_does_not_vanish(schedule, key, least):
    error = error_of(schedule=schedule)
    assert error.key == key
    assert error.fix == f"Set {key}=0 for none, or at least {least}."


@pytest.mark.parametrize(("fraction", "phase"), [(0.004, "QAT"), (0.996, "full-precision")])
def test_a_fraction_without_a_step_is_an_error_with_the_possible_ones(fraction, phase):
    error = error_of(qat={"scheme": "sequential", "fraction": fraction})
    assert (error.key, error.value) == ("qat.fraction", fraction)
    assert f"leaves no {phase} step" in error.problem
    assert error.fix == "The smallest possible is 0.01, the largest is 0.99."


@pytest.mark.parametrize("qat", TWO_PHASES)
def test_one_step_is_too_short_for_two_phases(qat):
    assert error_of(steps=1, qat=qat).key == "tokens"


def test_auto_outside_the_measured_range_is_used_and_said():
    timeline = build_timeline(make_config(steps=1000, qat={"scheme": "sequential", "bits": 4}))
    S = 1000 * TOKENS_PER_STEP / (PARAMETERS / 2)
    assert timeline.planned_fraction == pytest.approx(math.exp(-6.7297 / math.log(S)), rel=1e-12)
    (warning,) = timeline.warnings
    assert "extrapolation" in warning
    assert f"{timeline.planned_fraction:.4f}" in warning
    assert "N = 1.46K" in warning


def test_a_fraction_given_needs_no_such_warning():
    assert build_timeline(make_config(qat={"scheme": "sequential", "fraction": 0.5})).warnings == ()


def test_a_value_that_nobody_set_is_not_named() -> None:
    for own in (["qat.scheme=fp"], ["qat.scheme=fp", "schedule.cooldown_fraction=0"]):
        assert build_timeline(load_run_config("quickstart", own)).warnings == ()
    own.append("schedule.phases.cooldown.betas=[0.9,0.9]")
    (warning,) = build_timeline(load_run_config("quickstart", own)).warnings
    assert warning.startswith("schedule.phases.cooldown has no effect")


@pytest.mark.parametrize(
    ("sections", "keys", "why"),
    [
        ({"qat": {"bits": 2, "learning_rate": 1e-4}}, "qat.bits, qat.learning_rate have", "without quantization"),
        ({"qat": {"lr_ratio": 0.5}}, "qat.lr_ratio has", "without quantization"),
        ({"qat": {"scheme": "scratch", "optimizer_state": "reset"}}, "qat.optimizer_state has", "from step 0"),
        ({"qat": {"scheme": "scratch", "warmup_fraction": 0.1}}, "qat.warmup_fraction has", "from step 0"),
        ({"qat": TWO_PHASES[1] | {"cooldown_fraction": 0.1}}, "qat.cooldown_fraction has", "one cooldown"),
        ({"schedule": {"exponent": 2.0, "shape": "linear"}}, "schedule.exponent has", "belongs to shape 1-sqrt"),
        ({"schedule": {"lowered_to": 0.5}}, "schedule.lowered_to has", "belongs to shape lowered_linear"),
        ({"schedule": {"shape": "cosine", "cooldown_fraction": 0}}, "schedule.shape has", "no cooldown"),
        (
            {"schedule": {"phases": {"qat_stable": {"weight_decay": 0}}}},
            "schedule.phases.qat_stable has",
            "warmup, stable, cooldown",
        ),
        (
            {"schedule": {"phases": {"cooldown": {"weight_decay": 0}}}, "qat": TWO_PHASES[1]},
            "schedule.phases.cooldown has",
            "qat_stable, qat_cooldown",
        ),
    ],
)
def test_a_setting_without_effect_is_named(sections, keys, why):
    (warning,) = build_timeline(make_config(**sections)).warnings
    assert warning.startswith(f"{keys} no effect: ")
    assert why in warning


@pytest.mark.parametrize(
    "sections",
    [
        {"schedule": {"exponent": 2.0, "shape": "sqrt"}},
        {"schedule": {"shape": "lowered_linear", "lowered_to": 0.5, "min_lr_ratio": 0.1}},
        {"qat": {"fraction": 0.3}},
        {"qat": {"scheme": "scratch", "fraction": 0.5, "learning_rate": 1e-4, "bits": 2}},
        {"qat": TWO_PHASES[0] | {"learning_rate": 1e-4, "cooldown_fraction": 0.5, "optimizer_state": "reset"}},
        {"qat": TWO_PHASES[1] | {"learning_rate": 1e-3, "warmup_fraction": 0.1}},
        {"schedule": {"phases": {"stable": {"betas": [0.9, 0.9]}}}},
    ],
)
def test_settings_with_an_effect_are_not(sections):
    assert build_timeline(make_config(steps=400, **sections)).warnings == ()


def test_a_fused_run_with_another_qat_rate_jumps():
    for rate in ({"learning_rate": 5e-4}, {"lr_ratio": 0.5}):
        (warning,) = build_timeline(make_config(qat=TWO_PHASES[1] | rate)).warnings
        assert "jump from 0.001 to 0.0005" in warning


def test_knots_that_end_above_the_floor():
    schedule = {"shape": "piecewise", "knots": [1, 0.5], "min_lr_ratio": 0.1}
    (warning,) = build_timeline(make_config(schedule=schedule)).warnings
    assert "ends at 0.55 of the peak" in warning


def test_beta2_raised_too_early_is_told_with_what_it_costs():
    config = make_config(1000, schedule={"cooldown_fraction": 0.5, "phases": {"cooldown": {"betas": [0.9, 0.999]}}})
    (warning,) = build_timeline(config).warnings
    # sqrt(1 - 0.999^500) = 0.627: the update's share that is left; 0.95^500 is nothing.
    assert "from 0.95 to 0.999" in warning
    assert "after 500 AdamW steps" in warning
    assert "by 0.63" in warning


@pytest.mark.parametrize(("steps", "warned"), [(2_040, True), (2_044, False)])
def test_beta2_may_be_raised_once_enough_steps_are_counted(steps, warned):
    """sqrt(1 - 0.999^t) = 0.8 at t = ln 0.36 / ln 0.999 = 1021.1."""
    phases = {"cooldown": {"betas": [0.9, 0.999]}}
    timeline = build_timeline(make_config(steps, schedule={"cooldown_fraction": 0.5, "phases": phases}))
    assert bool(timeline.warnings) == warned


def test_lowering_beta2_or_raising_beta1_is_no_trap():
    phases = {"cooldown": {"betas": [0.99, 0.9]}}
    assert build_timeline(make_config(1000, schedule={"phases": phases})).warnings == ()


@pytest.mark.parametrize(("state", "counted"), [("keep", 3_500), ("reset", 500)])
def test_a_reset_at_the_switch_starts_the_count_again(state, counted):
    qat = {"scheme": "fused", "fraction": 0.4, "optimizer_state": state}
    phases = {"qat_cooldown": {"betas": [0.9, 0.999]}}
    timeline = build_timeline(make_config(5_000, schedule={"cooldown_fraction": 0.3, "phases": phases}, qat=qat))
    assert timeline.boundaries == (3_000, 3_500)
    assert bool(timeline.warnings) == (state == "reset")
    if state == "reset":
        assert f"after {counted} AdamW steps" in timeline.warnings[0]


def test_keep_at_becomes_steps_beside_the_boundaries():
    timeline = build_timeline(make_config(qat=TWO_PHASES[1]))
    assert timeline.boundaries == (50, 80)
    keep_at = [30 * TOKENS_PER_STEP, 50 * TOKENS_PER_STEP + 400, 70 * TOKENS_PER_STEP - 400, 100 * TOKENS_PER_STEP]
    assert kept_steps(timeline, keep_at) == (30, 50, 70, 80, 100)


@pytest.mark.parametrize("tokens", [100, 101 * TOKENS_PER_STEP])
def test_keep_at_outside_the_run_is_an_error(tokens):
    with pytest.raises(UserError, match="outside the run") as caught:
        build_timeline(make_config(checkpoint={"keep_at": [tokens]}))
    assert (caught.value.key, caught.value.value) == ("checkpoint.keep_at", tokens)
