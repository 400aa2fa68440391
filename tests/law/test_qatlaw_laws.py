"""Loss laws against their formulas, against numerical derivatives, and against what any such law must do."""

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from qatlaw import optimal_fraction, synthetic
from qatlaw.errors import InputError
from qatlaw.laws import CHEN_2025, CHINCHILLA, FORMS, KUMAR_2024, QAT_PER_BITS, QAT_UNIFIED, Law, Points

QUANTIZED = [form for form in FORMS.values() if form.quantized]
SPLIT = [form for form in FORMS.values() if form.has_fraction]


def between(low: float, high: float):
    """Log-uniform."""
    return st.floats(math.log(low), math.log(high)).map(math.exp)


sizes, tokens = between(1e7, 1e11), between(1e9, 1e13)
bits = st.floats(1, 8)
fractions = st.floats(0.01, 0.99)


@st.composite
def laws(draw, forms=tuple(FORMS.values())):
    """Sound laws, their exponents drawn over the whole of their bounds, their coefficients over six decades."""
    form = draw(st.sampled_from(list(forms)))
    return Law(form, tuple(draw(between(1e-3, 1e3) if p.log else st.floats(p.low, p.high)) for p in form.parameters))


# ---- formulas, written out by hand -------------------------------------------------------------------------------


def unified_by_hand(c, N, D_fp, D_qat, B):
    size = N * B / 8
    return (
        c["alpha"]
        + c["beta"] / (D_fp + D_qat) ** c["gamma"]
        + c["zeta"] / N ** c["eta"]
        + c["theta"] * 2 ** (-c["kappa"] * B)
        + c["phi"] * 2 ** (-c["chi"] * B) / (N ** c["psi"] * (D_qat / size) ** c["omega"])
        + c["lambda"] * 2 ** (-c["mu"] * B) / (N ** c["nu"] * (D_fp / size) ** c["xi"] * (D_qat / size) ** c["rho"])
    )


@given(sizes, tokens, fractions, bits)
def test_the_unified_law_is_its_formula(N, D, f, B):
    by_hand = unified_by_hand(synthetic.COEFFICIENTS, N, D * (1 - f), D * f, B)
    assert float(synthetic.law().loss(N, D * (1 - f), D * f, B)) == pytest.approx(by_hand, rel=1e-12)


@given(sizes, tokens, fractions, st.sampled_from([1.0, 2.0, 4.0]))
def test_the_law_of_one_width_is_the_unified_one_with_its_bit_terms_absorbed(N, D, f, B):
    c = dict(synthetic.COEFFICIENTS)
    for factor, exponent in (("theta", "kappa"), ("phi", "chi"), ("lambda", "mu")):
        c[factor] *= 2 ** (-c.pop(exponent) * B)
    law = QAT_PER_BITS.bind(c)
    assert float(law.loss(N, D * (1 - f), D * f, B)) == pytest.approx(
        float(synthetic.law().loss(N, D * (1 - f), D * f, B)), rel=1e-12
    )
    assert float(law.optimal_fraction(N, D, B)) == pytest.approx(
        float(synthetic.law().optimal_fraction(N, D, B)), abs=1e-8
    )


BASE = {"alpha": 1.7, "beta": 900.0, "gamma": 0.33, "zeta": 400.0, "eta": 0.31}


def test_the_rivals_are_their_formulas():
    N, D_fp, D_qat, B = 4e8, 3e10, 1e10, 3.0
    base = 1.7 + 900 / 4e10**0.33
    chen = CHEN_2025.bind({**BASE, "k": 0.2, "gamma_D": 0.08, "gamma_N": 0.2})
    assert float(chen.loss(N, D_fp, D_qat, B)) == pytest.approx(
        base + 400 / N**0.31 + 0.2 * 4e10**0.08 / N**0.2, rel=1e-13
    )
    kumar = KUMAR_2024.bind({**BASE, "gamma_w": 2.0})
    effective = N * (1 - math.exp(-B / 2.0))
    assert float(kumar.loss(N, D_fp, D_qat, B)) == pytest.approx(base + 400 / effective**0.31, rel=1e-13)


@given(laws(QUANTIZED), sizes, tokens, bits)
def test_a_run_without_qat_tokens_has_the_loss_of_its_full_precision_part(law, N, D, B):
    base = CHINCHILLA.bind({name: law.coefficients[name] for name in CHINCHILLA.names})
    assert float(law.loss(N, D, 0, B)) == pytest.approx(float(base.loss(N, D, 0, 16)), rel=1e-13)


# ---- derivatives -------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(laws(), sizes, tokens, fractions, bits)
def test_analytic_gradients_are_the_numerical_ones(law, N, D, f, B):
    run = (N, D * (1 - f), D * f, B) if law.form.quantized else (N, D, 0.0, B)
    analytic = law.form.loss_and_gradient_at(law.theta, Points.of(*run))[1]
    loss = float(law.loss(*run))
    for i, value in enumerate(law.theta):
        step = 1e-6 * max(abs(value), 1e-2)
        up, down = list(law.theta), list(law.theta)
        up[i] += step
        down[i] -= step
        numerical = (law.form.loss(up, *run) - law.form.loss(down, *run)) / (2 * step)
        # Rounding of the two losses, over the step, is all that a central difference may be off by.
        allowed = 1e-6 * abs(float(numerical)) + 1e-14 * loss / step
        assert float(analytic[i]) == pytest.approx(float(numerical), abs=4 * allowed), law.form.names[i]


# ---- what any sound law does -------------------------------------------------------------------------------------


@given(laws(QUANTIZED), sizes, tokens, tokens, bits, st.floats(1.001, 100))
def test_more_tokens_of_either_phase_never_raise_the_loss(law, N, D_fp, D_qat, B, more):
    if law.form is CHEN_2025:
        return  # its quantization error rises with tokens: that is its claim
    before = float(law.loss(N, D_fp, D_qat, B))
    allowed = before * (1 + 1e-12)
    assert float(law.loss(N, D_fp * more, D_qat, B)) <= allowed
    assert float(law.loss(N, D_fp, D_qat * more, B)) <= allowed


@given(sizes, tokens, tokens, bits, st.floats(1.01, 100))
def test_the_synthetic_law_falls_strictly(N, D_fp, D_qat, B, more):
    law = synthetic.law()
    assert law.loss(N, D_fp * more, D_qat, B) < law.loss(N, D_fp, D_qat, B)
    assert law.loss(N, D_fp, D_qat * more, B) < law.loss(N, D_fp, D_qat, B)


@given(laws(SPLIT), sizes, tokens, bits, st.sampled_from([1e-6, 1e-3, 1e3]))
def test_counts_may_be_told_in_any_unit_if_the_factors_are(law, N, D, B, unit):
    """Parameters and tokens both in thousands: the law with its factors converted says the same."""
    c = law.coefficients
    changed = {
        **c,
        "beta": c["beta"] * unit ** c["gamma"],
        "zeta": c["zeta"] * unit ** c["eta"],
        "phi": c["phi"] * unit ** c["psi"],
        "lambda": c["lambda"] * unit ** c["nu"],
    }
    other = law.form.bind(changed)
    assert float(other.loss(N * unit, 0.7 * D * unit, 0.3 * D * unit, B)) == pytest.approx(
        float(law.loss(N, 0.7 * D, 0.3 * D, B)), rel=1e-9
    )
    assert float(other.optimal_fraction(N * unit, D * unit, B)) == pytest.approx(
        float(law.optimal_fraction(N, D, B)), abs=1e-8
    )


# ---- the optimal fraction ----------------------------------------------------------------------------------------


def pure_and_interaction(law, N, D, f, B):
    """P and I, from the law's own losses: each is what is left when the other terms' factors are all but gone."""
    c = law.coefficients
    none = dict.fromkeys(("alpha", "beta", "zeta", "theta"), 1e-300)
    run = (N, D * (1 - f), D * f, B)
    pure = law.form.bind({**c, **none, "lambda": 1e-300}).loss(*run)
    return float(pure), float(law.form.bind({**c, **none, "phi": 1e-300}).loss(*run))


@settings(max_examples=300)
@given(laws(SPLIT), sizes, tokens, bits)
def test_the_optimum_is_stationary(law, N, D, B):
    """f/(1-f) = (rho + omega P/I)/xi."""
    f = float(law.optimal_fraction(N, D, B))
    assert 0 < f <= 1
    if not 1e-9 < f < 1 - 1e-9:
        return  # f/(1-f) has no digits left to compare
    c = law.coefficients
    pure, interaction = pure_and_interaction(law, N, D, f, B)
    if min(pure, interaction) < 1e-280:
        return  # a term below the smallest doubles
    assert f / (1 - f) == pytest.approx((c["rho"] + c["omega"] * pure / interaction) / c["xi"], rel=1e-5)


@settings(max_examples=60)
@given(sizes, tokens, bits)
def test_the_optimum_is_the_argmin_of_the_loss(N, D, B):
    law = synthetic.law()
    f = float(law.optimal_fraction(N, D, B))
    assert 0 < f < 1
    # The loss is flat at its minimum, so a search over losses finds it to the root of the rounding only; the error of
    # quantization alone, without the constant parts, is searched.
    found = minimize_scalar(
        lambda x: math.log(sum(pure_and_interaction(law, N, D, x, B))),
        bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    assert f == pytest.approx(found.x, abs=2e-6)


@given(sizes, st.floats(1, 8))
def test_few_tokens_per_byte_have_the_small_s_limit(N, B):
    """With omega < rho + xi the interaction rules at small S, and f tends to rho/(rho + xi)."""
    c = synthetic.COEFFICIENTS
    tiny = 1e-30 * N * B / 8
    assert float(synthetic.law().optimal_fraction(N, tiny, B)) == pytest.approx(
        c["rho"] / (c["rho"] + c["xi"]), abs=1e-4
    )


@given(sizes, tokens, bits, st.floats(1.01, 1e3))
def test_the_fraction_rises_with_s_where_xi_and_rho_exceed_omega(N, D, B, more):
    law = synthetic.law()
    assert law.optimal_fraction(N, D * more, B) > law.optimal_fraction(N, D, B)


@pytest.mark.parametrize("D", [1e9, 1e11, 1e13])
def test_the_fraction_falls_with_s_where_omega_exceeds_them(D):
    law = QAT_UNIFIED.bind({**synthetic.COEFFICIENTS, "omega": 0.6})
    assert law.optimal_fraction(4e8, 3 * D, 4) < law.optimal_fraction(4e8, D, 4)


def test_with_equal_bit_and_size_exponents_the_fraction_depends_on_s_alone():
    law = synthetic.law()  # chi = mu and psi = nu
    S = 500.0
    f = [float(law.optimal_fraction(N, S * N * B / 8, B)) for N in (1e7, 4e8, 3e10) for B in (1, 2.5, 6)]
    assert np.ptp(f) < 1e-8


def test_the_synthetic_law_follows_the_closed_form():
    """To 0.031 on average over the range of arXiv 2509.22935: tokens per byte 36 to 1.3e5."""
    D = np.geomspace(36, 1e5, 200) * 4e8 * 4 / 8
    law = synthetic.law().optimal_fraction(4e8, D, 4)
    assert np.mean(np.abs(law - optimal_fraction(4e8, D, 4))) < 0.031


def test_fractions_broadcast_and_agree_with_single_ones():
    N, D, B = np.array([[1e8], [1e9]]), 1e11, np.array([1.0, 2.0, 4.0])
    f = synthetic.law().optimal_fraction(N, D, B)
    assert f.shape == (2, 3)
    alone = [[float(synthetic.law().optimal_fraction(n, D, b)) for b in B] for n in N.ravel()]
    np.testing.assert_allclose(f, alone, rtol=1e-12)


def test_many_fractions_are_those_of_few():
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(18, 22, 40_000)), np.exp(rng.uniform(22, 28, 40_000))
    together = synthetic.law().optimal_fraction(N, D, 4)
    some = rng.integers(0, 40_000, 200)
    np.testing.assert_allclose(together[some], synthetic.law().optimal_fraction(N[some], D[some], 4), rtol=1e-12)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_qat_from_scratch_lies_outside_of_a_law_that_diverges_there():
    with pytest.raises(InputError, match="interaction term diverges"):
        synthetic.law().loss(1e8, 0, 1e10, 4)
    assert np.isfinite(CHEN_2025.bind({**BASE, "k": 0.2, "gamma_D": 0.08, "gamma_N": 0.2}).loss(1e8, 0, 1e10, 4))


def test_a_law_without_quantization_refuses_quantized_runs():
    with pytest.raises(InputError, match="full-precision runs only"):
        CHINCHILLA.bind(BASE).loss(1e8, 1e10, 1e9, 4)


@pytest.mark.parametrize("form", [CHINCHILLA, CHEN_2025, KUMAR_2024])
def test_no_optimal_fraction_where_the_split_does_not_count(form):
    with pytest.raises(InputError, match="does not depend on how the tokens are split"):
        form.optimal_fraction([1.0] * len(form.parameters), 1e8, 1e10, 4)


@pytest.mark.parametrize(
    ("run", "key"),
    [
        ((0, 1e9, 1e9, 4), "N"),
        ((1e8, -1, 1e9, 4), "D_fp"),
        ((1e8, 1e9, math.nan, 4), "D_qat"),
        ((1e8, 0, 0, 4), r"D_fp \+ D_qat"),
        ((1e8, 1e9, 1e9, 0), "B"),
    ],
)
def test_runs_that_are_none_are_named(run, key):
    with pytest.raises(InputError, match=f"^{key} = "):
        synthetic.law().loss(*run)


def test_unsound_coefficients_are_refused():
    with pytest.raises(InputError, match=r"^coefficients\.rho = 1\.5"):
        QAT_UNIFIED.bind({**synthetic.COEFFICIENTS, "rho": 1.5})
    with pytest.raises(InputError, match=r"^coefficients\.beta = -1\.0"):
        QAT_UNIFIED.bind({**synthetic.COEFFICIENTS, "beta": -1.0})
    with pytest.raises(InputError, match="also needs rho"):
        QAT_UNIFIED.bind({name: value for name, value in synthetic.COEFFICIENTS.items() if name != "rho"})
    with pytest.raises(InputError, match=r"coefficients\.tau"):
        QAT_UNIFIED.bind({**synthetic.COEFFICIENTS, "tau": 1.0})


def test_a_law_survives_json_and_pickle():
    law = synthetic.law()
    assert law.form.bind(json.loads(json.dumps(law.coefficients))) == law
    assert pickle.loads(pickle.dumps(law)) == law


def test_every_form_names_its_source_and_its_parameters_once():
    for form in FORMS.values():
        assert form.source
        assert len(set(form.names)) == len(form.names)
        used = {name for term in form.terms for name in (term.coefficient, *term.exponents)}
        assert used == set(form.names)
