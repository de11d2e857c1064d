"""The function that Ray Tune runs for a node: it holds no GPU memory and no model, the ranks do."""

from __future__ import annotations

from typing import Any

from ray import tune

from segfleet.sweeps.order import Order
from segfleet.sweeps.trial import perform


def trial(config: dict[str, Any]) -> None:
    """Train the node of `config`; every validation and the outcome go to Tune."""
    tune.report(perform(Order.model_validate_json(config["order"]), tune.report))
