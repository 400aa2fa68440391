"""A value that nobody set never makes a run impossible: `auto` and the default lengths give way, and it is said."""

import math

import pytest

from qatlaw.bit_widths import BIT_WIDTHS
from qatscale.config.recipe import load_run_config, recipe_names
from qatscale.config.sizes import count_parameters
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from tests.schedule.schedule_configs import TOKENS_PER_STEP, make_config

A = 6.7297
"""The closed form's constant."""


def phases(timeline):
    return {segment.phase: segment.steps for segment in timeline.segments}


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("scheme", ["fp", "sequential", "fused", "scratch"])
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_on_any_budget(name, scheme, bits):
    """Twice the warm-up, which is as short as a recipe's own settings allow, half of Chinchilla's, it, twice it."""
    recipe = load_run_config(name)
    params = count_parameters(recipe.model)
    short = [2 * recipe.schedule.warmup_tokens, 2.5 * recipe.schedule.warmup_tokens]
    for tokens in (*short, 10 * params, 20 * params, 40 * params):
        overrides = [f"tokens={round(tokens)}", f"qat.bits={bits}", f"qat.scheme={scheme}", "qat.fraction=auto"]
        if scheme in ("fp", "scratch"):
            overrides.pop()
        config = load_run_config(name, overrides)
        timeline = build_timeline(config)
        lengths = phases(timeline)
        assert lengths.get("warmup", lengths.get("qat_warmup")) >= 1
        ends = [lengths.get("cooldown"), lengths.get("qat_cooldown")]
        assert [bool(end) for end in ends] == [scheme in ("fp", "sequential"), scheme != "fp"]
        if scheme == "fused":
            S = config.tokens / (params * bits / 8)
            optimum = math.exp(-A / math.log(S)) if S > 1 else 0.0
            steps = timeline.steps
            held = round(config.schedule.cooldown_fraction * steps)
            assert timeline.qat_steps == max(steps - round((1 - optimum) * steps), held)


@pytest.mark.parametrize("scheme", ["fp", "sequential", "fused", "scratch"])
@pytest.mark.parametrize("name", recipe_names())
def test_a_recipes_own_lengths_give_way_to_other_tokens(name, scheme):
    recipe = load_run_config(name)
    per_step = recipe.tokens_per_step
    amounts = {3 * per_step, 1_000_000, 50_000_000, recipe.tokens // 100, recipe.tokens // 10, 10 * recipe.tokens}
    for tokens in sorted(amount for amount in amounts if amount >= 2 * per_step):
        for bits, fraction in ((1, "auto"), (8, 0.3)):
            overrides = [f"tokens={tokens}", f"qat.bits={bits}", f"qat.scheme={scheme}"]
            overrides += [f"qat.fraction={fraction}"] if scheme in ("sequential", "fused") else []
            config = load_run_config(name, overrides)
            lengths = phases(build_timeline(config))
            own = recipe.schedule.warmup_tokens
            share = round(own / recipe.tokens * config.tokens)
            assert config.schedule.warmup_tokens in (own, max(share, per_step))
            assert lengths.get("warmup", lengths.get("qat_warmup")) == round(config.schedule.warmup_tokens / per_step)


def test_a_shorter_warmup_is_noted_and_recorded():
    config = load_run_config("86m", ["tokens=100M"])  # its 86M and a fifth of 100M do not fit
    assert config.schedule.warmup_tokens == 1_000_000  # 86M of 8.6B
    assert "does not fit; schedule.warmup_tokens=1000000" in build_timeline(config).warnings[0]
    assert load_run_config("86m", ["tokens=108M"]).schedule.warmup_tokens == 86_000_000


def test_a_recipe_of_less_than_one_step_keeps_its_steps_unless_tokens_are_given():
    own, long = load_run_config("debug"), load_run_config("debug", ["data.sequence_length=4096"])
    assert phases(build_timeline(long)) == phases(build_timeline(own))
    assert len(build_timeline(long).warnings) == 2  # tokens and warm-up
    with pytest.raises(UserError, match=r"tokens = 10240: less than one .*, 16.38K \(4 sequences of 4096"):
        build_timeline(load_run_config("debug", ["data.sequence_length=4096", "tokens=10240"]))


def test_a_length_that_was_asked_for_stays_an_error():
    with pytest.raises(UserError, match=r"schedule\.warmup_tokens = 60000000: .* do not fit"):
        build_timeline(load_run_config("86m", ["tokens=50M", "schedule.warmup_tokens=60M"]))


def test_a_length_on_the_command_line_replaces_the_recipes_in_the_other_unit():
    config = load_run_config("86m", ["schedule.warmup_fraction=0.9", "schedule.cooldown_tokens=0.8B"])
    assert phases(build_timeline(config)) == {"warmup": 14_763, "qat_stable": 114, "qat_cooldown": 1526}
    config = load_run_config("86m", ["schedule.warmup_fraction=0.9"])  # leaves a tenth for the recipe's fifth
    assert phases(build_timeline(config)) == {"warmup": 14_763, "qat_cooldown": 1640}


@pytest.mark.parametrize(
    ("name", "tokens", "optimum"),
    [("86m", "1.72B", 0.1612), ("194m", "3.9B", 0.1610), ("396m", "8B", 0.1614), ("759m", "15B", 0.1605),
     ("2p2b", "44B", 0.1613), ("86m", "2.3B", 0.1842)],
)  # fmt: skip
def test_auto_is_the_cooldown_where_the_optimum_is_shorter(name, tokens, optimum):
    config = load_run_config(name, [f"tokens={tokens}"])
    S = config.tokens / (count_parameters(config.model) / 2)
    assert math.exp(-A / math.log(S)) == pytest.approx(optimum, abs=1e-3)
    timeline = build_timeline(config)
    assert timeline.qat_steps == phases(timeline)["qat_cooldown"] == round(0.2 * timeline.steps)
    assert timeline.planned_fraction == timeline.qat_fraction
    note = timeline.warnings[0]
    assert f"qat.fraction=auto is {timeline.qat_fraction:.4f}" in note
    assert f"optimum is {math.exp(-A / math.log(S)):.4f}" in note


def test_an_optimum_that_holds_the_cooldown_stays():
    timeline = build_timeline(load_run_config("86m", ["tokens=8.6B"]))
    assert timeline.planned_fraction > 0.25
    assert timeline.warnings == ()


def test_auto_holds_a_rewarmup_that_was_asked_for():
    # 20 steps of cooldown and a fifth of the phase: 25 steps are the shortest phase that holds both.
    qat = {"scheme": "fused", "bits": 8, "warmup_fraction": 0.2}
    timeline = build_timeline(make_config(schedule={"cooldown_fraction": 0.2}, qat=qat))
    assert (timeline.qat_steps, phases(timeline)["qat_warmup"]) == (25, 5)


def test_auto_leaves_the_warmup_its_steps():
    # The optimum at 1 bit is 35 % of these tokens; 80 % of warm-up leave 20 %.
    qat = {"scheme": "fused", "bits": 1}
    timeline = build_timeline(make_config(schedule={"warmup_fraction": 0.8}, qat=qat))
    assert phases(timeline) == {"warmup": 80, "qat_cooldown": 20}
    assert "qat.fraction=auto is 0.2000, the most at which the full-precision phase" in timeline.warnings[0]


@pytest.mark.parametrize("scheme", ["sequential", "fused"])
@pytest.mark.parametrize("name", ["debug", "quickstart"])
def test_auto_without_an_optimum_is_the_shortest_phase(name, scheme):
    """S <= 1: the closed form reaches 0 at 1, and has no meaning below."""
    config = load_run_config(name, ["tokens=128K", "qat.bits=8", f"qat.scheme={scheme}", "qat.fraction=auto"])
    assert config.tokens < count_parameters(config.model)
    timeline = build_timeline(config)
    # A fifth of 3 steps rounds to one step of cooldown, of 2 steps to none.
    assert timeline.qat_steps == (round(0.2 * timeline.steps) if scheme == "fused" else 3)
    S = config.tokens / count_parameters(config.model)
    assert f"no optimum at {S:.3g} tokens per parameter byte" in timeline.warnings[0]


def test_an_optimum_of_less_than_a_step_is_the_shortest_phase():
    # S = 2.05: exp(-6.7297 / ln 2.05) = 8e-5 of the tokens.
    qat = {"scheme": "sequential", "bits": 8}
    config = make_config(steps=3, schedule={"cooldown_fraction": 0, "warmup_fraction": 0}, qat=qat)
    assert build_timeline(config).qat_steps == 1


def test_a_number_that_clashes_stays_an_error():
    with pytest.raises(UserError, match=r"schedule.cooldown_fraction = 0.2: .*qat.fraction >= 0.2") as caught:
        build_timeline(load_run_config("86m", ["tokens=1.72B", "qat.fraction=0.16"]))
    assert caught.value.key == "schedule.cooldown_fraction"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        # (what was asked for; the steps of each phase of 100, the default cut to what is left)
        ({"schedule": {"cooldown_fraction": 1}}, {"cooldown": 100}),
        ({"schedule": {"warmup_fraction": 0.9}}, {"warmup": 90, "cooldown": 10}),
        ({"qat": {"scheme": "fused", "fraction": 0.1}}, {"warmup": 1, "stable": 89, "qat_cooldown": 10}),
        ({"qat": {"scheme": "fused", "fraction": 0.1, "warmup_tokens": 4 * TOKENS_PER_STEP}},
         {"warmup": 1, "stable": 89, "qat_warmup": 4, "qat_cooldown": 6}),
        ({"qat": {"scheme": "sequential", "fraction": 0.5, "cooldown_fraction": 1}},
         {"stable": 40, "cooldown": 10, "qat_cooldown": 50}),
        ({"qat": {"scheme": "sequential", "fraction": 0.5, "warmup_fraction": 0.9}},
         {"stable": 40, "cooldown": 10, "qat_warmup": 45, "qat_cooldown": 5}),
    ],
)  # fmt: skip
def test_a_default_length_takes_what_is_left(sections, expected):
    timeline = build_timeline(make_config(**sections))
    assert phases(timeline) == expected
    assert ["is cut to" in line for line in timeline.warnings] == [True]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_default_cooldown_that_rounds_to_no_step_is_noted(steps):
    timeline = build_timeline(make_config(steps))
    assert phases(timeline) == {"stable": steps}
    assert timeline.warnings == (f"the default of schedule.cooldown_fraction, 0.2, rounds to no step of {steps}",)


@pytest.mark.parametrize("name", sorted({*recipe_names()} - {"debug"}))
def test_recipes_cool_down_as_the_laboratory_found_best(name: str) -> None:
    """analysis/studies/cooldown-1to1000: beta2 0.99 and no weight decay, in full precision and under fused QAT."""
    for scheme in ("fp", "fused"):
        *_, before, cooldown = build_timeline(load_run_config(name, [f"qat.scheme={scheme}"])).segments
        assert (before.betas, before.weight_decay) == ((0.9, 0.95), 0.1)
        assert (cooldown.kind, cooldown.betas, cooldown.weight_decay) == ("cooldown", (0.9, 0.99), 0)
