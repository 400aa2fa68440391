"""The closed form of the optimal QAT fraction against the design's tables and against its own definition."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

import qatlaw
from qatlaw.fraction import MEASURED_S, A, fraction_at

# N, D and f at 1, 2, 4, 6 bits, rounded to three digits.
TABLE = [
    (86e6, 2.3e9, (0.285, 0.237, 0.184, 0.152)),
    (86e6, 100e9, (0.479, 0.451, 0.420, 0.400)),
    (396e6, 100e9, (0.413, 0.378, 0.339, 0.315)),
    (759e6, 150e9, (0.401, 0.365, 0.325, 0.299)),
    (2.2e9, 220e9, (0.365, 0.325, 0.281, 0.253)),
]


@pytest.mark.parametrize(
    ("N", "D", "B", "f"),
    [(N, D, B, f) for N, D, row in TABLE for B, f in zip((1, 2, 4, 6), row, strict=True)],
)
def test_closed_form_table(N, D, B, f):
    assert qatlaw.optimal_fraction(N, D, B) == pytest.approx(f, abs=5.001e-4)


@pytest.mark.parametrize(
    ("f", "S", "half_a_digit"), [(0.10, 18.6, 0.05), (0.25, 128, 0.5), (0.40, 1548, 0.5), (0.50, 16460, 5)]
)
def test_s_for_a_given_fraction(f, S, half_a_digit):
    found = brentq(lambda log_s: fraction_at(math.exp(log_s)) - f, 0.1, 30, xtol=1e-14)
    assert math.exp(found) == pytest.approx(S, abs=half_a_digit)


def test_tokens_per_parameter_byte_by_hand():
    # 396M parameters at 4 bits are 198 MB; 100B tokens over them.
    assert qatlaw.tokens_per_parameter_byte(396e6, 100e9, 4) == pytest.approx(100e9 / 198e6, rel=1e-15)


@given(st.floats(1.01, 1e9))
def test_the_short_form_is_the_long_form(S):
    log = math.log(S)
    assert fraction_at(S) == pytest.approx(math.exp(log - A / log) / S, rel=1e-9)


@given(st.floats(1.1, 1e8), st.floats(1.0001, 1e3))
def test_the_fraction_rises_with_s_and_stays_inside(S, factor):
    low, high = fraction_at(S), fraction_at(S * factor)
    assert 0 < low < high < 1


def test_arrays_broadcast_and_agree_with_numbers():
    N, D, B = np.array([[86e6], [396e6]]), 100e9, np.array([1, 2, 4, 6])
    S = qatlaw.tokens_per_parameter_byte(N, D, B)
    f = qatlaw.optimal_fraction(N, D, B)
    assert S.shape == f.shape == (2, 4)
    for i in range(2):
        for j in range(4):
            alone = qatlaw.tokens_per_parameter_byte(N[i, 0], D, B[j])
            assert isinstance(alone, float)
            assert alone == S[i, j]
            assert fraction_at(alone) == pytest.approx(f[i, j], rel=1e-15)


@pytest.mark.parametrize("S", [1.0, 0.5, 0.0, -3.0, math.nan, math.inf, np.array([20.0, 0.9])])
def test_no_fraction_where_the_form_has_none(S):
    with pytest.raises(ValueError, match="defined for S > 1 only"):
        fraction_at(S)


@pytest.mark.parametrize(("name", "amounts"), [("N", (0, 1e9, 4)), ("D", (1e8, -1, 4)), ("B", (1e8, 1e9, math.nan))])
def test_an_amount_that_is_none_is_named(name, amounts):
    with pytest.raises(ValueError, match=f"^{name} = "):
        qatlaw.tokens_per_parameter_byte(*amounts)


def test_extrapolation_begins_just_outside_the_measured_range():
    def named(S: float) -> bool:
        return "S = " in (qatlaw.extrapolation_warning(86e6, S * 86e6, 8) or "")

    low, high = MEASURED_S
    assert not named(low * (1 + 1e-12))
    assert not named(high * (1 - 1e-12))
    assert named(low * 0.999)
    assert named(high * 1.001)


def test_the_warning_names_what_is_outside_and_nothing_else():
    assert qatlaw.extrapolation_warning(396e6, 100e9, 4) is None
    small = qatlaw.extrapolation_warning(1e6, 5e6, 4)
    assert "S = 10 " in small
    assert "N = 1M (measured 86M to 2.2B)" in small
    assert "D = 5M (measured 2.3B to 1.4T)" in small
    assert "B = " not in small
    eight_bits = qatlaw.extrapolation_warning(396e6, 100e9, 8)
    assert "B = 8" in eight_bits
    assert "S = " not in eight_bits
    assert "N = " not in eight_bits


def test_the_ends_of_the_measured_range_are_rounded_numbers():
    assert qatlaw.extrapolation_warning(85.9e6, 8.6e9, 4) is None
    assert "N = 80M" in qatlaw.extrapolation_warning(80e6, 8.6e9, 4)
    assert "N = 2.3B" in qatlaw.extrapolation_warning(2.3e9, 220e9, 4)


def test_import_is_fast_and_light():
    code = (
        "import time, numpy; t = time.process_time(); import qatlaw; print(time.process_time() - t)\n"
        "import sys; print(sorted({'torch', 'scipy', 'qatscale', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(out[0]) < 0.3, "beyond NumPy's own import, qatlaw costs next to nothing"
    assert out[1] == "[]"
