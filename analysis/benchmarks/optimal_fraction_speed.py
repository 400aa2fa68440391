"""How many plans a second the law's optimal fraction makes: a million random (N, D, B) of the synthetic law.

python analysis/benchmarks/optimal_fraction_speed.py
"""

from __future__ import annotations

import time

import numpy as np

from qatlaw import synthetic

PLANS = 1_000_000
REPEATS = 10


def main() -> None:
    law, rng = synthetic.law(), np.random.default_rng(0)
    N = np.exp(rng.uniform(np.log(1e7), np.log(1e11), PLANS))
    D = np.exp(rng.uniform(np.log(1e9), np.log(1e13), PLANS))
    B = rng.choice([1.0, 2.0, 3.0, 4.0, 6.0, 8.0], PLANS)
    wall, cpu = [], []
    for _ in range(REPEATS):
        started = time.perf_counter(), time.process_time()
        f = law.optimal_fraction(N, D, B)
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    print(f"million plans a CPU second: median {1 / np.median(cpu):.1f}, worst {1 / np.max(cpu):.1f}")
    print(f"million plans a second of wall time: best {1 / np.min(wall):.1f}, median {1 / np.median(wall):.1f}")

    # Exact? The derivative's sign changes within 1e-6 of each answer: f/(1-f) against (rho + omega P/I)/xi.
    c = law.coefficients

    def slope(f: np.ndarray) -> np.ndarray:
        S = D / (N * B / 8)
        pure = c["phi"] * 2 ** (-c["chi"] * B) / (N ** c["psi"] * (f * S) ** c["omega"])
        both = c["lambda"] * 2 ** (-c["mu"] * B) / (N ** c["nu"] * ((1 - f) * S) ** c["xi"] * (f * S) ** c["rho"])
        return c["xi"] * both / (1 - f) - (c["rho"] * both + c["omega"] * pure) / f

    right = (slope(f - 1e-6) < 0) & (slope(f + 1e-6) > 0)
    print(f"exact to 1e-6: {right.mean():.2%} of them")


if __name__ == "__main__":
    main()
