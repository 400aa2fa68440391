"""What holds for every timeline that can be built, and for every mend that an error proposes."""

import re

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qatscale.config.schedule_section import SHAPES
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from qatscale.schedule.difference import first_difference
from tests.schedule.schedule_configs import TOKENS_PER_STEP, make_config

# Many drawn lengths do not fit: that most examples are refused is meant, and no reason to fail by the luck of the seed.
holds = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
MONOTONE = [name for name, shape in SHAPES.items() if shape.monotone and shape.lifted]
shares = st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.1, 0.2, 0.25, 0.5])
tokens = st.integers(0, 3000 * TOKENS_PER_STEP) | st.integers(0, 50 * TOKENS_PER_STEP)


def length(name):
    """Nothing, a fraction or tokens; small ones often, so that many lengths fit and many do not."""
    fraction = (shares | st.floats(0.05, 0.3)).map(lambda value: {f"{name}_fraction": value})
    return st.just({}) | fraction | tokens.map(lambda value: {f"{name}_tokens": value})


def long(name):
    """A fraction or tokens, mostly too long for what else there is."""
    return st.floats(0.2, 1).map(lambda value: {f"{name}_fraction": value}) | st.integers(
        200 * TOKENS_PER_STEP, 3000 * TOKENS_PER_STEP
    ).map(lambda value: {f"{name}_tokens": value})


@st.composite
def shapes(draw):
    shape = draw(st.sampled_from([name for name, shape in SHAPES.items() if shape.monotone]))
    floor = draw(st.sampled_from([0.01, 0.1, 1.0] if shape == "exponential" else [0.0, 0.1, 1.0]))
    return {"shape": shape, "min_lr_ratio": floor}


@st.composite
def configs(draw, schemes=("fp", "sequential", "fused", "scratch"), length=length):
    scheme = draw(st.sampled_from(schemes))
    qat = {"scheme": scheme, "learning_rate": draw(st.sampled_from([None, 1e-3, 3e-4, 2e-3]))} | draw(length("warmup"))
    if scheme in ("sequential", "fused"):
        qat["fraction"] = draw(st.floats(0.0001, 0.9999))
    if scheme == "sequential":
        qat["cooldown_fraction"] = draw(st.none() | shares)
    schedule = draw(length("warmup")) | draw(length("cooldown")) | draw(shapes())
    return make_config(draw(st.integers(1, 3000)), schedule=schedule, qat=qat)


def built(config):
    """The timeline, or None where the lengths do not fit (what is said then is tested apart)."""
    try:
        return build_timeline(config)
    except UserError:
        return None


@holds
@given(configs())
def test_segments_partition_the_run_and_rates_stay_under_the_peak(config):
    timeline = built(config)
    assume(timeline is not None)
    owner = [segment for segment in timeline.segments for _ in range(segment.start, segment.end)]
    assert len(owner) == timeline.steps == config.steps
    first_quantized = timeline.steps if timeline.switch_step is None else timeline.switch_step
    qat_peak = (timeline.qat_lr_ratio or 1) * config.optimizer.learning_rate * (1 + 1e-12)
    for step, segment in enumerate(owner):
        now = timeline.at(step)
        assert now.phase == segment.phase
        assert now.quantized == (step >= first_quantized) == now.phase.startswith("qat_")
        assert 0 < now.learning_rate <= (qat_peak if now.quantized else config.optimizer.learning_rate)
    assert all(0 < step < timeline.steps for step in timeline.boundaries)


@holds
@given(configs(), st.randoms())
def test_a_pure_function_of_the_step(config, random):
    timeline = built(config)
    assume(timeline is not None)
    steps = list(range(timeline.steps))
    in_order = [timeline.at(step) for step in steps]
    random.shuffle(steps)
    again = build_timeline(config.model_copy())
    assert all(again.at(step) == in_order[step] for step in steps[:200])


@holds
@given(configs(), st.integers(2, 7))
def test_counted_in_larger_batches_the_phases_keep_their_share(config, factor):
    """Lengths are given in tokens and shares, so another batch size moves a boundary by less than one of its steps."""
    timeline = built(config)
    coarse = built(config.model_copy(update={"batch": config.batch.model_copy(update={"sequences": 10 * factor})}))
    assume(timeline is not None and coarse is not None)
    if timeline.switch_step is not None:
        # Two roundings to whole steps, of the run's length and of the switch.
        assert abs(coarse.switch_step * coarse.tokens_per_step - timeline.switch_step * timeline.tokens_per_step) <= (
            coarse.tokens_per_step + timeline.tokens_per_step
        )


@holds
@given(st.integers(10, 3000), st.floats(0.01, 0.99), shapes(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_fused_without_rewarmup_is_fp_step_for_step(steps, fraction, shape, warmup, cooldown):
    schedule = shape | {"warmup_fraction": warmup, "cooldown_fraction": cooldown}
    fused = built(make_config(steps, schedule=schedule, qat={"scheme": "fused", "fraction": fraction}))
    assume(fused is not None)
    plain = build_timeline(make_config(steps, schedule=schedule))
    assert [fused.at(i).learning_rate for i in range(steps)] == [plain.at(i).learning_rate for i in range(steps)]
    assert first_difference(fused, plain, steps) == f"quantized at step {fused.switch_step}: True against False"


@holds
@given(configs(schemes=("sequential",)))
def test_sequential_is_an_fp_run_and_a_scratch_run_one_after_the_other(config):
    timeline = built(config)
    assume(timeline is not None)
    switch = timeline.switch_step
    alone = config.model_copy(
        update={"tokens": switch * TOKENS_PER_STEP, "qat": config.qat.model_copy(update={"scheme": "fp"})}
    )
    first = build_timeline(alone)
    assert [timeline.at(step) for step in range(switch)] == [first.at(step) for step in range(switch)]

    own = {"warmup_fraction": config.qat.warmup_fraction, "warmup_tokens": config.qat.warmup_tokens}
    if own == {"warmup_fraction": None, "warmup_tokens": None}:
        own["warmup_fraction"] = 0.02
        assume(round(0.02 * timeline.qat_steps) > 0)
        assume(not any("default" in line for line in timeline.warnings))  # the one phase alone asks for it by name
    if config.qat.cooldown_fraction is not None:
        own |= {"cooldown_fraction": config.qat.cooldown_fraction, "cooldown_tokens": None}
    rest = make_config(
        timeline.qat_steps,
        schedule=config.schedule.model_dump() | own,
        qat={"scheme": "scratch", "lr_ratio": timeline.qat_lr_ratio},
    )
    second = build_timeline(rest)
    assert [timeline.at(switch + step) for step in range(second.steps)] == [second.at(i) for i in range(second.steps)]


MEND = re.compile(r"(schedule|qat)\.(\w+?)\s*(<=|>=|=)\s*([0-9][0-9.e+-]*[0-9]|[0-9])")


def unfit(config):
    """What `config` is told about a phase that its lengths do not fit into: (the phase, what to do), or None."""
    try:
        build_timeline(config)
    except UserError as error:
        where = re.search(r"do not fit into the \d+ steps of ([^.]+)\.", error.problem)
        return (where[1], error.fix) if where else None
    return None


@holds
@given(configs(length=long))
def test_every_mend_that_an_error_proposes_mends_it(config):
    told = unfit(config)
    assume(told is not None)
    where, do = told
    mends = MEND.findall(do)
    assert mends or "shorter" in do, do
    for section, key, _, value in mends:
        mended = config.model_dump()
        mended[section][key] = float(value) if key.endswith("fraction") else int(value)
        # Another phase may be too short as well, and is named next; this one is mended.
        assert (unfit(type(config).model_validate(mended)) or [None])[0] != where, (do, key)


@pytest.mark.parametrize("steps", [2, 3, 7, 1000, 123_457])
def test_the_named_smallest_and_largest_fraction_are_possible(steps):
    schedule = {"warmup_fraction": 0, "cooldown_fraction": 0}
    with pytest.raises(UserError, match="smallest possible") as caught:
        build_timeline(make_config(steps, schedule=schedule, qat={"scheme": "fused", "fraction": 0.1 / steps}))
    smallest, largest = (float(found) for found in re.findall(r"is ([0-9.e-]*[0-9])", caught.value.fix))
    for fraction, qat_steps in ((smallest, 1), (largest, steps - 1)):
        timeline = build_timeline(make_config(steps, schedule=schedule, qat={"scheme": "fused", "fraction": fraction}))
        assert timeline.qat_steps == qat_steps
