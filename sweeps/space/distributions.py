"""The axes of a space as Optuna's distributions. Optuna is imported where it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from segfleet.sweeps.space.axis import Axis

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def domain(axis: Axis) -> BaseDistribution:
    """The axis for Optuna. Values of a list go by their place: Optuna cannot hold mappings."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if axis.continuous:
        low, high = axis.values
        return FloatDistribution(low, high, log=axis.kind == "loguniform")
    return CategoricalDistribution(list(range(len(axis.values))))


def value_at(axis: Axis, given: Any) -> Any:
    return given if axis.continuous else axis.values[given]


def place_of(axis: Axis, value: Any) -> Any:
    return value if axis.continuous else axis.values.index(value)
