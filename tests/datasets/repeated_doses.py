"""How the shipped data of repeated doses were simulated; run it to write the file anew.

Exact in law: one-compartment kinetics with first-order absorption and white noise on the
concentration are linear, so that each step is normal with moments by the matrix exponential.
"""

import numpy as np
from scipy.linalg import expm

SUBJECTS, DOSE, INTERVAL, NUM_DOSES = 24, 300.0, 12.0, 6
KA, KE, VOLUME = 1.2, 0.10, 30.0  # 1/h, 1/h, l at 70 kg
SPREAD = {"ka": 0.30, "ke": 0.25, "volume": 0.15}
SYSTEM, NOISE = 0.35, 0.20  # mg/l per root hour; mg/l
NOMINAL = np.array([1.0, 3.0, 6.0, 11.5, 25.0, 35.5, 49.0, 52.0, 59.5, 71.0])


def step(x, ka, ke, volume, h, rng):
    """Gut (mg) and concentration (mg/l) after h hours; covariance by Van Loan's block."""
    A = np.array([[-ka, 0.0], [ka / volume, -ke]])
    noise = np.diag([0.0, SYSTEM**2])
    block = expm(np.block([[-A, noise], [np.zeros((2, 2)), A.T]]) * h)
    F = block[2:, 2:].T
    Q = F @ block[:2, 2:]
    return F @ x + np.array([0.0, np.sqrt(Q[1, 1])]) * rng.normal()


def simulate():
    """Rows (subject, weight, time, concentration)."""
    rng = np.random.default_rng(20)
    rows = []
    for subject in range(1, SUBJECTS + 1):
        weight = round(rng.normal(70.0, 12.0), 1)
        ka = KA * np.exp(SPREAD["ka"] * rng.normal())
        ke = KE * np.exp(SPREAD["ke"] * rng.normal())
        volume = VOLUME * (weight / 70.0) * np.exp(SPREAD["volume"] * rng.normal())
        times = np.round(NOMINAL + rng.uniform(-0.4, 0.4, size=NOMINAL.size), 2)
        events = sorted(
            [(INTERVAL * k, "dose") for k in range(NUM_DOSES)] + [(t, "sample") for t in times]
        )
        x, now = np.zeros(2), 0.0
        for t, what in events:
            if t > now:
                x, now = step(x, ka, ke, volume, t - now, rng), t
            if what == "dose":
                x = x + np.array([DOSE, 0.0])
            else:
                rows.append((subject, weight, t, round(x[1] + NOISE * rng.normal(), 3)))
    return rows


if __name__ == "__main__":
    print("subject,weight,time,conc")
    for row in simulate():
        print(",".join(f"{value:g}" for value in row))
