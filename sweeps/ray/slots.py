"""What every trial of Tune is called and takes of the machine."""

from __future__ import annotations

import math
from typing import Any

NAMES = {
    "trial_name_creator": lambda trial: trial.trial_id,
    "trial_dirname_creator": lambda trial: trial.trial_id,
}


def share(resources: Any) -> dict[str, float]:
    """What a trial takes of the Ray cluster: a slot, and its share of the GPUs if there are any."""
    import ray

    cluster = ray.cluster_resources()
    gpus = cluster.get("GPU", 0) if resources.on == "local" else 0
    gpus_each = min(resources.ranks, gpus / resources.at_once)
    return {
        "cpu": resources.ranks if resources.address else 1,
        "gpu": math.floor(gpus_each) if gpus_each >= 1 else gpus_each,
    }
