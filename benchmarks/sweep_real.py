"""A sweep on real data: the seven U-Net-Lite variants and the plain U-Net on 2018 DSB nuclei, one
first stage, two fine-tunings each.

    python benchmarks/sweep_real.py [WORK]

The data set is looked for in $SEGFLEET_TEST_DATA, else in ../shared/data beside the repository.
Images are resized to 128 x 128 (scores stay native); the budget is small: 150 + 50 steps of 8
patches of 64 x 64. With WORK, a folder that is kept, the same command goes on after anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SEGFLEET_TEST_DATA", HERE.parents[1] / "shared" / "data")) / "dsb2018"
LITE = ("standard", "depthwise", "se", "se_depthwise", "se_depthwise_r32", "spatial", "ultralight")
SPACE = {
    "name": "lite_on_dsb2018",
    "base": {
        "name": "lite_on_dsb2018",
        "data": {
            "store": "store",
            "batch": 8,
            "patch": [64, 64],
            "augment": {"rot90": True, "noise": 0.0},
        },
        "model": {"name": "unet_lite_standard"},
        "optimizer": {"name": "adamw", "weight_decay": 1e-2},
        "stages": [{"epochs": 1, "lr": 1e-3}],
        "engine": {"precision": "bf16", "channels_last": True},
    },
    "axes": {"model.name": [*(f"unet_lite_{name}" for name in LITE), "plain_unet_2d"]},
    "stages": [
        {"name": "train", "epochs": 6, "steps": 25, "lr": 1e-3, "warmup": 25},
        {
            "name": "finetune",
            "epochs": 2,
            "steps": 25,
            "lr": [1e-3, 1e-4],
            "schedule": "cosine",
            "inherit": "weights+optimizer",
        },
    ],
}


def segfleet(work: Path, *arguments: str | Path) -> dict:
    command = [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(
        subprocess.run(
            command, cwd=work, env=environment, stdout=subprocess.PIPE, check=True, text=True
        ).stdout
    )


def main(work: Path) -> None:
    segfleet(work, "preprocess", "dsb2018", "--raw", DATA, "--out", "store", "--size", "128", "128")
    (work / "space.yaml").write_text(yaml.safe_dump(SPACE))
    start = time.time()
    done = segfleet(work, "sweep", "space.yaml", "--slots", "2")
    rows = [
        {
            "network": row["point"]["model.name"],
            "fine-tuning rate": row["point"]["stages.1.lr"],
            "dice": round(row["score"], 4),
            "ci95": [round(bound, 4) for bound in row["ci95"]],
        }
        for row in done["ranking"]
    ]
    result = {
        "minutes": round((time.time() - start) / 60, 1),
        "load": os.getloadavg(),
        "savings": done["savings"],
        "ranking": rows,
    }
    (HERE / "results" / "sweep_real.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
            main(Path(scratch))
