"""Which axes made the difference: PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), as Optuna has
it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from segfleet.sweeps.space.distributions import domain, place_of
from segfleet.sweeps.space.space import Search

FEWEST = 10  # points, below which the best tenth says nothing
BEST = 0.25  # share of the points that count as good


def importance(
    search: Search, rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]] | None:
    """Of every objective the axes' shares of what sets its best quarter of the points apart from
    all of them; they add up to 1. `rows`: the ranked points. None of a population, whose points
    have no one value, without two axes, or with fewer than FEWEST points."""
    axes = search.axes
    if search.space.scheduler == "pbt" or len(axes) < 2 or len(rows) < FEWEST:
        return None
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {axis.label: domain(axis) for axis in axes}
    by_objective = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # experimental; all scores are equal
        evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST)
        for objective in search.objectives:
            study = optuna.create_study(direction="maximize" if objective.sign > 0 else "minimize")
            for row in rows:
                study.add_trial(
                    optuna.trial.create_trial(
                        params={a.label: place_of(a, row["point"][a.label]) for a in axes},
                        distributions=distributions,
                        value=row["values"][objective.name],
                    )
                )
            by_objective[objective.name] = get_param_importances(study, evaluator=evaluator)
    return {
        name: {axis: round(float(share), 4) for axis, share in shares.items()}
        for name, shares in by_objective.items()
    }
