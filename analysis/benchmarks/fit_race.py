"""The Chinchilla part of a fit, raced: qatlaw, the PyPI package `chinchilla`, plain `scipy.optimize.curve_fit`.

    python3 -m venv ../race && ../race/bin/pip install chinchilla==0.2.0 numpy scipy pandas
    PYTHONPATH=analysis ../race/bin/python analysis/benchmarks/fit_race.py --seeds 5

`chinchilla` 0.2.0 (github.com/kyo-takano/chinchilla) is installed apart from the project. What its API needs: a folder
to keep its database in, which takes runs one by one and is filled at once here; a grid of starts (its README's for
language models, with three values an axis in place of five: 243 starts in place of 3,125); `fit` forks a pool of
processes. It draws a figure at each fit, which is left out here. Its default loss is asymmetric, for the lower envelope
of noisy runs; it is raced with that, and with the symmetric log-Huber at the delta of Hoffmann et al. (1e-3).

All fit the same 100 full-precision runs (10 sizes x 10 token counts over the paper's ranges) of the synthetic law with
0.2 % noise. Quality: error of the exponents, and of the noise-free loss at a model and a run four times beyond.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd

from qatlaw import synthetic
from qatlaw.fitting import fit
from qatlaw.laws import CHINCHILLA
from qatlaw.table import RunTable

TRUE = {name: synthetic.COEFFICIENTS[name] for name in ("alpha", "beta", "gamma", "zeta", "eta")}
GRID = {
    "E": np.linspace(1, 2, 3),
    "a": np.linspace(1, 10, 3),
    "b": np.linspace(1, 10, 3),
    "alpha": np.linspace(0.1, 0.7, 3),
    "beta": np.linspace(0.1, 0.7, 3),
}
Coefficients = tuple[float, float, float, float, float]
"""alpha, beta, gamma, zeta, eta, as qatlaw names them."""


def chinchilla_loss(x: tuple[np.ndarray, np.ndarray], *theta: float) -> np.ndarray:
    (N, D), (alpha, beta, gamma, zeta, eta) = x, theta
    return alpha + beta / D**gamma + zeta / N**eta


def runs(seed: int) -> pd.DataFrame:
    N, D = np.meshgrid(np.geomspace(86e6, 2.2e9, 10), np.geomspace(2.3e9, 1.4e12, 10))
    exact = chinchilla_loss((N.ravel(), D.ravel()), *TRUE.values())
    noise = np.exp(synthetic.NOISE * np.random.default_rng(seed).standard_normal(exact.size))
    return pd.DataFrame({"N": N.ravel().round(), "D": D.ravel().round(), "loss": exact * noise})


def by_qatlaw(data: pd.DataFrame) -> Coefficients:
    frame = data.rename(columns={"N": "n_params", "D": "tokens_fp"}).assign(bits=16, tokens_qat=0, scheme="fp")
    return fit(CHINCHILLA, RunTable.from_frame(frame)).law.theta


def by_curve_fit(start: list[float]) -> Callable[[pd.DataFrame], Coefficients]:
    def make(data: pd.DataFrame) -> Coefficients:
        from scipy.optimize import curve_fit

        x = (data["N"].to_numpy(), data["D"].to_numpy())
        return tuple(curve_fit(chinchilla_loss, x, data["loss"], p0=start, maxfev=100_000)[0])

    return make


def by_chinchilla(symmetric: bool) -> Callable[[pd.DataFrame], Coefficients]:
    def make(data: pd.DataFrame) -> Coefficients:
        from chinchilla import Chinchilla
        from chinchilla._metrics import asymmetric_mae, log_huber

        def huber(y_true: np.ndarray, y_pred: np.ndarray) -> np.ndarray:
            return log_huber(y_true, y_pred, delta=1e-3)

        with tempfile.TemporaryDirectory() as folder:
            model = Chinchilla(
                folder,
                param_grid=GRID,
                seed_ranges={"C": (1e18, 1e22), "N_to_D": (1, 1e5)},
                loss_fn=huber if symmetric else asymmetric_mae,
                log_level=50,
            )
            model.database.df = data.assign(C=6 * data["N"] * data["D"])[["C", "N", "D", "loss"]]
            model.visualizer.LBFGS = model.visualizer.optim = lambda *_, **__: None
            model.fit(parallel=True)
            # Its beta, alpha are the exponents of tokens and of parameters.
            return float(model.E), float(model.B), float(model.beta), float(model.A), float(model.alpha)

    return make


RACERS: dict[str, Callable[[pd.DataFrame], Coefficients]] = {
    "qatlaw": by_qatlaw,
    "curve_fit, SciPy's default start (ones)": by_curve_fit([1.0] * 5),
    "curve_fit, start at Hoffmann et al.'s coefficients": by_curve_fit([1.69, 410.7, 0.28, 406.4, 0.34]),
    "chinchilla 0.2.0, its default loss": by_chinchilla(symmetric=False),
    "chinchilla 0.2.0, log-Huber": by_chinchilla(symmetric=True),
}


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="racers whose name has this in it")
    options = parser.parse_args()
    seeds = options.seeds
    warnings.simplefilter("ignore")
    by_qatlaw(runs(10_000))  # imports and first calls are nobody's race
    beyond = np.array([4 * 2.2e9]), np.array([4 * 1.4e12])
    true_beyond = chinchilla_loss(beyond, *TRUE.values())[0]
    print(
        "| fit | CPU s median | wall s median | gamma error | eta error | alpha error | loss error 4x beyond | failed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, make in RACERS.items():
        if options.only not in name:
            continue
        rows, failed = [], 0
        for seed in range(seeds):
            data = runs(seed)
            wall, cpu = time.perf_counter(), cpu_seconds()
            try:
                theta = make(data)
            except (RuntimeError, ValueError) as error:
                failed += 1
                print(f"{name}: {error}", flush=True)
                continue
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            found = dict(zip(TRUE, theta, strict=True))
            errors = [abs(found[key] / TRUE[key] - 1) for key in ("gamma", "eta", "alpha")]
            rows.append([cpu, wall, *errors, abs(chinchilla_loss(beyond, *theta)[0] / true_beyond - 1)])
        cells = "- | - | - | - | - | -"
        if rows:
            cpu, wall, *errors = np.median(rows, axis=0)
            cells = f"{cpu:.3f} | {wall:.3f} | " + " | ".join(f"{error:.2%}" for error in errors)
        print(f"| {name} | {cells} | {failed} |", flush=True)


if __name__ == "__main__":
    main()
