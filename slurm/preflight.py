"""Everything about a recipe that can be known before a job waits in a queue. `python -m
segfleet.slurm.preflight RANKS < recipes.json`.

In a process of its own, because it builds the network and so needs torch, which the submitting
process does without.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from segfleet.core.errors import InputError
from segfleet.pipeline.stage import OVERRIDES


def check_recipes(recipes: list[dict[str, Any]], ranks: int) -> list[str]:
    """Network, loss, patch, batch and ranks fit together and to the store, in every recipe. Raises
    InputError. What is legal and maybe not meant is returned, a sentence each."""
    recipes = list({json.dumps(_parts(recipe)): recipe for recipe in recipes}.values())
    command = [sys.executable, "-P", "-m", "segfleet.slurm.preflight", str(ranks)]
    done = subprocess.run(command, input=json.dumps(recipes), capture_output=True, text=True)
    if done.returncode == 2:
        raise InputError(done.stderr.strip())
    if done.returncode:
        raise RuntimeError(f"the check of the recipe failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _parts(recipe: dict[str, Any]) -> list[Any]:
    """What is checked of a recipe: of two that agree in it, one is enough."""
    parts = [
        recipe["model"],
        recipe["loss"],
        recipe["engine"],
        *(recipe["data"][key] for key in ("store", "patch", "batch", "made_for")),
    ]
    stages = [
        [stage["freeze"], stage["inherit"], *(stage.get(key) for key in OVERRIDES)]
        for stage in recipe["stages"]
    ]
    return [*parts, recipe["evaluation"]["mirror"], stages]


def main() -> int:
    from segfleet.pipeline import parts
    from segfleet.pipeline.recipe import parse
    from segfleet.pipeline.training.train import check_batches
    from segfleet.preprocess.stores.manifest import load_manifest

    doubts: dict[str, None] = {}
    try:
        for recipe in map(parse, json.load(sys.stdin)):
            manifest = load_manifest(recipe.data.store)
            parts.check_recipe(recipe, manifest)
            doubts |= dict.fromkeys(parts.doubts(recipe, manifest))
            check_batches(recipe, int(sys.argv[1]))
    except ValueError as error:
        if getattr(error, "exit_code", None) != 2:
            raise
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{json.dumps(list(doubts))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
