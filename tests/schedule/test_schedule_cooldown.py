"""Cooldown shapes against their formulas, their means in closed form, and their identities."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.integrate import quad

from qatscale.config.schedule_section import NAMES, SHAPES, ScheduleConfig
from qatscale.schedule.timeline import Cooldown, cooldown_of

progress = st.floats(0, 1)
NEEDED = {"exponential": {"min_lr_ratio": 0.01}, "piecewise": {"knots": [1.0, 0.5, 0.0]}}
"""Settings without which a shape is refused."""


def cooldown(shape: str, **settings) -> Cooldown:
    return cooldown_of(ScheduleConfig(shape=shape, **{**NEEDED.get(shape, {}), **settings}))


# shape, settings, factor at a quarter, mean over x in [0, 1]
FORMULAS = [
    ("linear", {}, 0.75, 1 / 2),
    ("cosine", {}, (1 + math.sqrt(0.5)) / 2, 1 / 2),
    ("mirror_cosine", {}, 1.5 - (1 + math.sqrt(0.5)) / 2, 1 / 2),
    ("1-sqrt", {}, 0.5, 1 / 3),
    ("1-sqrt", {"exponent": 3.0}, 1 - 1 / 64, 3 / 4),
    ("1-square", {}, 0.9375, 2 / 3),
    ("lowered_linear", {}, 0.525, 0.7 / 2),
    ("lowered_linear", {"lowered_to": 0.4}, 0.3, 0.4 / 2),
    ("exponential", {}, 0.1**0.5, (1 - 0.01) / math.log(100)),
    ("piecewise", {}, 0.75, 1 / 2),
    ("piecewise", {"knots": [1.0, 0.2, 0.1, 0.0]}, 0.4, (0.6 + 0.15 + 0.05) / 3),
]


@pytest.mark.parametrize(("shape", "settings", "at_a_quarter", "mean"), FORMULAS)
def test_a_quarter_in_and_the_mean_over_the_cooldown(shape, settings, at_a_quarter, mean):
    factor = cooldown(shape, **settings).factor
    assert factor(0.25) == pytest.approx(at_a_quarter, rel=1e-14)
    knots = len(settings.get("knots", ())) - 1
    kinks = [i / knots for i in range(1, knots)] or None
    area, _ = quad(factor, 0, 1, points=kinks)
    assert area == pytest.approx(mean, rel=1e-6)


def test_every_shape_of_the_table_and_its_setting_has_a_formula_here():
    assert {shape for shape, *_ in FORMULAS} == set(SHAPES)
    varied = {(shape, key) for shape, settings, *_ in FORMULAS for key in settings}
    assert {(name, shape.setting) for name, shape in SHAPES.items() if shape.setting and shape.lifted} <= varied


def test_where_shapes_begin_and_end():
    begin = dict.fromkeys(SHAPES, 1.0) | {"lowered_linear": 0.7}
    end = dict.fromkeys(SHAPES, 0.0) | {"exponential": 0.01}
    assert {shape: cooldown(shape).factor(0) for shape in SHAPES} == begin
    assert {shape: cooldown(shape).factor(1) for shape in SHAPES} == end


def test_lowered_linear_drops_at_once():
    assert cooldown("lowered_linear", lowered_to=1.0).factor(0.3) == cooldown("linear").factor(0.3)


def test_exponential_falls_in_equal_ratios_to_its_floor():
    assert cooldown("exponential").factor(0.5) == pytest.approx(0.1, rel=1e-14)


def test_piecewise_passes_through_its_knots():
    factor = cooldown("piecewise", knots=[1.0, 0.8, 0.1, 0.3, 0.0]).factor
    assert [factor(i / 4) for i in range(5)] == [1.0, 0.8, 0.1, 0.3, 0.0]
    assert factor(0.125) == pytest.approx(0.9)


@given(progress)
def test_mirror_cosine_mirrors_the_cosine_at_the_line(x):
    line = cooldown("linear").factor(x)
    assert cooldown("mirror_cosine").factor(x) - line == pytest.approx(line - cooldown("cosine").factor(x), abs=1e-15)


@given(progress)
def test_a_piecewise_of_two_knots_is_the_line(x):
    assert cooldown("piecewise", knots=[1.0, 0.0]).factor(x) == pytest.approx(cooldown("linear").factor(x), abs=1e-15)


@given(
    st.sampled_from([name for name, shape in SHAPES.items() if shape.monotone]),
    st.floats(0.001, 1),
    st.floats(0.01, 10),
    progress,
    progress,
)
def test_monotone_shapes_never_rise_and_stay_between_floor_and_peak(shape, floor, exponent, x, y):
    factor = cooldown(shape, exponent=exponent, min_lr_ratio=floor).factor
    early, late = factor(min(x, y)), factor(max(x, y))
    assert late <= early + 1e-15
    assert floor * (1 - 1e-12) <= late
    assert early <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_floor_is_where_it_ends(shape):
    assert cooldown(shape, min_lr_ratio=0.1).factor(1) == pytest.approx(0.1, rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_aliases_are_one_shape(name):
    assert cooldown(name) == cooldown("1-sqrt" if "sqrt" in name else name)
    assert ScheduleConfig(shape=name, **NEEDED.get(name, {})).shape in SHAPES


def test_the_default_is_1_sqrt_to_zero():
    assert cooldown_of(ScheduleConfig()) == Cooldown("1-sqrt", 0.5, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "1-sqroot"}, "1-sqrt"),
        ({"shape": "exponential"}, "never reaches 0"),
        ({"shape": "piecewise"}, "needs knots"),
        ({"shape": "piecewise", "knots": [1.0]}, "a start and an end"),
    ],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**settings)
