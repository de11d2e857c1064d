"""How often a 95 % interval holds the true mean: percentile and BCa bootstrap (scipy's), Student's
t and the product's studentised bootstrap, for 3 to 50 patients and four kinds of scores.

    python benchmarks/intervals.py [repetitions]

Result: benchmarks/results/intervals.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from segfleet.pipeline.scoring import intervals

RESULT = Path(__file__).parent / "results" / "intervals.json"
PATIENTS = (3, 4, 5, 6, 8, 10, 20, 50)
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]  # (sums, counts)


def single(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values, np.ones(len(values))


def normal(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return single(rng.normal(0.8, 0.1, n))


def dice(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return single(rng.beta(9, 1.2, n))


def hd95(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return single(rng.lognormal(1, 0.8, n))


def failures(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Dice, of which every tenth is 0."""
    return single(rng.beta(9, 1.2, n) * (rng.random(n) >= 0.1))


def slices(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """One to five images of each patient, which resemble each other."""
    counts = rng.integers(1, 6, n)
    own = rng.beta(9, 1.2, n)
    return np.array(
        [np.clip(own[i] + rng.normal(0, 0.03, counts[i]), 0, 1).sum() for i in range(n)]
    ), counts.astype(float)


KINDS: dict[str, tuple[Draw, float | None]] = {
    "normal": (normal, 0.8),
    "Dice (beta 9, 1.2)": (dice, 9 / 10.2),
    "Dice, every tenth case failed": (failures, 0.9 * 9 / 10.2),
    "HD95 (lognormal)": (hd95, float(np.exp(1.32))),
    "Dice of 1 to 5 images per patient": (slices, None),
}


def bounds_of(sums: np.ndarray, counts: np.ndarray) -> dict[str, list[float] | None]:
    means = sums.sum() / counts.sum()
    residuals = (sums - means * counts) / counts.mean()
    patients = len(sums)
    error = np.sqrt((residuals**2).sum() / (patients * (patients - 1)))
    reach = stats.t.ppf(0.975, patients - 1) * error
    found: dict[str, list[float] | None] = {"Student's t": [means - reach, means + reach]}
    for method in ("percentile", "BCa"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bounds = stats.bootstrap(
                (sums, counts),
                lambda s, c, axis: s.sum(axis) / c.sum(axis),
                paired=True,
                vectorized=True,
                method=method,
                n_resamples=1000,
                rng=np.random.default_rng(0),
            ).confidence_interval
        found[method] = [float(bounds.low), float(bounds.high)]
    fewest, intervals.FEWEST = intervals.FEWEST, 2
    draws = intervals.bootstrap_weights(patients)
    found["studentised"] = intervals.interval(sums[:, None], counts[:, None], draws)
    intervals.FEWEST = fewest
    return found


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rows = []
    for kind, (draw, mean) in KINDS.items():
        if mean is None:
            sums, counts = draw(np.random.default_rng(1), 500_000)
            mean = sums.sum() / counts.sum()
        for patients in PATIENTS:
            rng = np.random.default_rng(patients)
            hits: dict[str, int] = {}
            widths: dict[str, list[float]] = {}
            for _ in range(repetitions):
                for method, found in bounds_of(*draw(rng, patients)).items():
                    low, high = found or (np.nan, np.nan)
                    hits[method] = hits.get(method, 0) + bool(low <= mean <= high)
                    widths.setdefault(method, []).append(high - low)
            row = {"scores": kind, "patients": patients}
            row |= {method: round(count / repetitions, 3) for method, count in hits.items()}
            row["median width"] = {
                method: round(float(np.median(w)), 4) for method, w in widths.items()
            }
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    RESULT.write_text(json.dumps({"repetitions": repetitions, "coverage": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
