"""Cooldown shapes against their formulas, their means in closed form, and their identities."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from qatscale.config.schema import ScheduleConfig
from qatscale.errors import UserError
from qatscale.schedule.shapes import Cooldown, cooldown_of

progress = st.floats(0, 1)

# name and settings, mean over x in [0, 1]
MEANS = [
    ({"shape": "linear"}, 1 / 2),
    ({"shape": "cosine"}, 1 / 2),
    ({"shape": "mirror_cosine"}, 1 / 2),
    ({"shape": "1-sqrt"}, 1 / 3),
    ({"shape": "1-sqrt", "exponent": 3.0}, 3 / 4),
    ({"shape": "1-square"}, 2 / 3),
    ({"shape": "lowered_linear"}, 0.7 / 2),
    ({"shape": "lowered_linear", "lowered_to": 0.4}, 0.4 / 2),
    ({"shape": "exponential", "floor": 0.01}, (1 - 0.01) / math.log(100)),
    ({"shape": "piecewise", "knots": (1.0, 0.5, 0.0)}, 1 / 2),
    ({"shape": "piecewise", "knots": (1.0, 0.2, 0.1, 0.0)}, (0.6 + 0.15 + 0.05) / 3),
]


@pytest.mark.parametrize(("settings", "mean"), MEANS)
def test_mean_over_the_cooldown(settings, mean):
    knots = len(settings.get("knots", ())) - 1
    kinks = [i / knots for i in range(1, knots)] or None
    area, _ = quad(Cooldown(**settings).factor, 0, 1, points=kinks)
    assert area == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("shape", ["linear", "cosine", "mirror_cosine", "1-sqrt", "1-square"])
def test_from_the_full_rate_to_none(shape):
    assert Cooldown(shape).factor(0) == 1
    assert Cooldown(shape).factor(1) == 0


@pytest.mark.parametrize(
    ("shape", "at_a_quarter"),
    [
        ("linear", 0.75),
        ("cosine", (1 + math.sqrt(0.5)) / 2),
        ("mirror_cosine", 1.5 - (1 + math.sqrt(0.5)) / 2),
        ("1-sqrt", 0.5),
        ("1-square", 0.9375),
        ("lowered_linear", 0.525),
    ],
)
def test_a_quarter_in(shape, at_a_quarter):
    assert Cooldown(shape).factor(0.25) == pytest.approx(at_a_quarter, rel=1e-14)


def test_lowered_linear_drops_at_once():
    assert Cooldown("lowered_linear").factor(0) == 0.7
    assert Cooldown("lowered_linear", lowered_to=1.0).factor(0.3) == Cooldown("linear").factor(0.3)


def test_exponential_falls_in_equal_ratios_to_its_floor():
    cooldown = Cooldown("exponential", floor=0.01)
    assert cooldown.factor(0) == 1
    assert cooldown.factor(0.5) == pytest.approx(0.1, rel=1e-14)
    assert cooldown.factor(1) == pytest.approx(0.01, rel=1e-14)


def test_piecewise_passes_through_its_knots():
    cooldown = Cooldown("piecewise", knots=(1.0, 0.8, 0.1, 0.3, 0.0))
    assert [cooldown.factor(i / 4) for i in range(5)] == [1.0, 0.8, 0.1, 0.3, 0.0]
    assert cooldown.factor(0.125) == pytest.approx(0.9)


@given(progress)
def test_mirror_cosine_mirrors_the_cosine_at_the_line(x):
    line = Cooldown("linear").factor(x)
    assert Cooldown("mirror_cosine").factor(x) - line == pytest.approx(line - Cooldown("cosine").factor(x), abs=1e-15)


@given(progress)
def test_a_piecewise_of_two_knots_is_the_line(x):
    assert Cooldown("piecewise", knots=(1.0, 0.0)).factor(x) == pytest.approx(Cooldown("linear").factor(x), abs=1e-15)


@given(
    st.sampled_from(["linear", "cosine", "mirror_cosine", "1-sqrt", "1-square", "lowered_linear", "exponential"]),
    st.floats(0.001, 1),
    st.floats(0.01, 10),
    progress,
    progress,
)
def test_never_rises_and_stays_between_floor_and_peak(shape, floor, exponent, x, y):
    cooldown = Cooldown(shape, exponent=exponent, floor=floor)
    early, late = cooldown.factor(min(x, y)), cooldown.factor(max(x, y))
    assert late <= early + 1e-15
    assert floor * (1 - 1e-12) <= late
    assert early <= 1


@pytest.mark.parametrize("shape", ["linear", "cosine", "mirror_cosine", "1-sqrt", "1-square", "exponential"])
def test_the_floor_is_where_it_ends(shape):
    assert Cooldown(shape, floor=0.1).factor(0) == 1
    assert Cooldown(shape, floor=0.1).factor(1) == pytest.approx(0.1, rel=1e-14)


@pytest.mark.parametrize("alias", ["sqrt", "minus_sqrt", "1-sqrt"])
def test_aliases_are_one_shape(alias):
    assert cooldown_of(ScheduleConfig(shape=alias)) == Cooldown("1-sqrt")


def test_the_default_is_1_sqrt_to_zero():
    assert cooldown_of(ScheduleConfig()) == Cooldown("1-sqrt", exponent=0.5, floor=0.0)


def test_every_shape_of_the_schema_is_built():
    for shape in ScheduleConfig.model_fields["shape"].annotation.__args__:
        settings = {"piecewise": {"knots": [1, 0]}, "exponential": {"min_lr_ratio": 0.1}}.get(shape, {})
        assert cooldown_of(ScheduleConfig(shape=shape, **settings)).factor(0) in (1, 0.7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "1-sqroot"}, "Did you mean '1-sqrt'"),
        ({"shape": "exponential"}, "never reaches 0"),
        ({"shape": "piecewise", "knots": (1.0,)}, "a start and an end"),
    ],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Cooldown(**settings)
