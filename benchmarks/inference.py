"""Memory of an ensemble of five against one network, each in a process of its own: peak resident
memory above that of the imports. `python benchmarks/inference.py`

maps     a small network, large maps: 8 classes of 64 x 192 x 192 voxels on the raw grid
weights  a large network, small maps: 31 million parameters, which do not stay loaded five times
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).with_name("results") / "inference.json"
CASES = {
    "maps": {"labels": 8, "grid": (64, 192, 192), "features": [4, 8], "patch": (32, 64, 64)},
    "weights": {"labels": 3, "grid": (32, 64, 64), "features": None, "patch": (32, 64, 64)},
}
TARGET = 1.2


def child(name: str, networks: int) -> None:
    """Predict one random volume; print the peak of memory in MB."""
    import resource

    import numpy as np
    import torch

    from segfleet.pipeline.loading import load_run  # noqa: F401  all imports come first
    from segfleet.pipeline.parts import build_network, task_of
    from segfleet.pipeline.recipe import parse
    from segfleet.pipeline.trained import Model, Trained
    from segfleet.preprocess.stores.manifest import Dataset, Manifest, Plan

    case = CASES[name]
    labels = {f"l{value}": value for value in range(case["labels"])}
    dataset = Dataset(name="d", reader="msd", dims=3, channels=("mr",), labels=labels)
    plan = Plan(target_spacing=(1.5, 1.0, 1.0), patch=case["patch"], normalisation=("zscore",))
    manifest = Manifest(format="zarr", layout=1, dataset=dataset, plan=plan, cases=())
    options = {"deep_supervision": False} | (
        {"features": case["features"]} if case["features"] else {}
    )
    recipe = parse(
        {
            "name": "r",
            "data": {"patch": list(case["patch"])},
            "model": {"name": "plain_unet_3d", "options": options},
            "stages": [{"epochs": 1, "lr": 1.0}],
        }
    )

    def weights(seed: int):
        seeded = recipe.model_copy(update={"seed": seed})
        return build_network(seeded, manifest, task_of(recipe, manifest)).state_dict()

    size = sum(value.numel() * value.element_size() for value in weights(0).values())
    trained = [
        Trained(
            uid=f"n{seed}",
            checkpoint="c",
            recipe=recipe,
            manifest=manifest,
            size=size,
            check=lambda: None,
            read=lambda seed=seed: weights(seed),
        )
        for seed in range(networks)
    ]
    image = np.random.default_rng(0).normal(size=(1, *case["grid"])).astype(np.float32)
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Model(trained).predict(image, (1.0, 1.0, 1.0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps({"above_mb": (peak - before) / 1024, "peak_mb": peak / 1024, "mb": size / 2**20})
    )


def main() -> None:
    found = {}
    for name in CASES:
        rows = {}
        for networks in (1, 5):
            done = subprocess.run(
                [sys.executable, __file__, name, str(networks)],
                check=True,
                capture_output=True,
                text=True,
            )
            rows[networks] = json.loads(done.stdout)
        ratio = rows[5]["above_mb"] / rows[1]["above_mb"]
        whole = rows[5]["peak_mb"] / rows[1]["peak_mb"]
        found[name] = {
            "one": rows[1],
            "five": rows[5],
            "ratio_above_imports": ratio,
            "ratio": whole,
        }
        print(
            f"{name}: {rows[1]['peak_mb']:.0f} MB with one, {rows[5]['peak_mb']:.0f} MB with five: "
            f"{whole:.2f}; above the imports {ratio:.2f} (target {TARGET})"
        )
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
