"""Population based training through Ray Tune. Every generation of a member is a stage, so the
population is a stage tree as well.

A member that is replaced goes on from its better's checkpoint because its stages, so far, are the
better's stages; the new rates make a new child. Generations are compared by the Dice of all
validation cases. A finished population is never run again; one that was killed starts again, and
what it happens to draw again is on disk already.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from segfleet.core import settings
from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_atomically
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.scoring.scored import evaluation_of
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps.ray.slots import NAMES, share, threads_of
from segfleet.sweeps.results.ledger import STOP
from segfleet.sweeps.space.plan import POPULATION, Plan, check, with_stores
from segfleet.sweeps.trial import perform

MEMBERS = "members"  # folder of <trial>.json: its stages so far


def run_population(
    plan: Plan,
    resources: Any,
    storage: Path,
    tick: Callable[[int, int], None],
    seconds: float | None,
) -> None:
    """Train the population to the epochs of the base recipe's stage; the members' paths become the
    plan's tree, unless it is stopped.

    `seconds`: after that the members save and stop.
    """
    space = plan.search.space
    generator = random.Random(space.seed)
    firsts = [
        {axis.label: axis.draw(generator) for axis in plan.search.axes}
        for _ in range(space.pbt.population)
    ]
    bases = with_stores(plan.search.trials(firsts[0]))
    check(bases, plan.stores)
    base = bases[0].recipe
    generations = base.stages[0].epochs // space.pbt.interval
    if generations < 2:
        found = f"{base.stages[0].epochs} epochs make {generations} generation(s) of {space.pbt.interval}"
        raise InputError(
            f"sweep {space.name}: pbt: {found}, expected at least 2; mend stages.0.epochs or "
            "pbt.interval"
        )
    (plan.folder / MEMBERS).mkdir(exist_ok=True)
    for path in (plan.folder / MEMBERS).glob("*.json"):
        path.unlink()
    order = {
        "recipe": base.model_dump(mode="json"), "generations": generations, "interval": space.pbt.interval, "runs": str(plan.runs),
        "sweep": str(plan.folder), "name": space.name, "ranks": resources.ranks, "threads": threads_of(resources), "on": resources.on,
        "options": resources.options or {}, "deadline": time.time() + seconds if seconds else None,
    }  # fmt: skip
    random.seed(space.seed)  # Tune's scheduler draws from these
    np.random.seed(space.seed)
    mutations = {
        axis.label: (list(axis.values) if not axis.continuous else domain(axis))
        for axis in plan.search.axes
    }
    scheduler = PopulationBasedTraining(
        time_attr="generation",
        metric="dice",
        mode="max",
        perturbation_interval=1,
        hyperparam_mutations=mutations,
        synch=True,
        # it multiplies by 0.8 or 1.2, whatever the range
        custom_explore_fn=lambda config: within(config, plan.search.axes),
    )
    starts = [{**first, "member": number} for number, first in enumerate(firsts)]
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(member, order=json.dumps(order)), share(resources)
        ),
        param_space={
            "member": tune.randint(0, 1),
            **{axis.label: tune.choice([None]) for axis in plan.search.axes},
        },
        tune_config=tune.TuneConfig(
            search_alg=BasicVariantGenerator(points_to_evaluate=starts),
            scheduler=scheduler,
            num_samples=len(starts),
            reuse_actors=True,
            **NAMES,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
        ),
    )
    results = tuner.fit()
    if results.errors:
        raise RuntimeError(
            f"{len(results.errors)} member(s) of the population failed; the first: "
            f"{results.errors[0]}"
        )
    paths = sorted((plan.folder / MEMBERS).glob("*.json"))
    members = [read_json(path, list) or [] for path in paths]
    if len(members) < len(starts) or any(len(stages) < generations for stages in members):
        return
    write_atomically(plan.folder / POPULATION, json.dumps(members, indent=1))
    plan.catch_up()
    tick(plan.tree.shared_epochs, plan.tree.shared_epochs)


def domain(axis: Any) -> Any:
    return {"uniform": tune.uniform, "loguniform": tune.loguniform}[axis.kind](*axis.values)


def within(config: dict[str, Any], axes: Sequence[Any]) -> dict[str, Any]:
    """The same, values of continuous axes inside the range that the space gives."""
    ranges = {axis.label: axis.values for axis in axes if axis.continuous}
    return {
        label: min(max(value, ranges[label][0]), ranges[label][1]) if label in ranges else value
        for label, value in config.items()
    }


def member(config: dict[str, Any], order: str) -> None:
    """One member: a stage per generation, after the stages of whoever it was copied from."""
    from segfleet.pipeline.run import stage_folders, stage_steps

    # config["member"] becomes that of whoever was copied
    facts, trial = (
        json.loads(order),
        tune.get_context().get_trial_id(),
    )
    stages: list[dict[str, Any]] = []
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            stages = json.loads((Path(folder) / "stages.json").read_text())
        write_atomically(Path(facts["sweep"]) / MEMBERS / f"{trial}.json", json.dumps(stages))

    def left() -> float:
        """Seconds; none after a stop."""
        return (
            0
            if (Path(facts["sweep"]) / STOP).exists()
            else facts["deadline"] - time.time()
            if facts["deadline"]
            else math.inf
        )

    while len(stages) < facts["generations"] and (seconds := left()) > 0:
        document = json.loads(json.dumps(facts["recipe"]))
        for label, value in config.items():
            if label != "member":
                settings.put(document, label, value, "pbt")
        stage = {
            **document["stages"][0],
            "epochs": facts["interval"],
            "name": f"generation {len(stages) + 1}",
        }
        stages = [*stages, {**stage, "inherit": "weights+optimizer"}]
        recipe = parse(
            {**document, "stages": stages, "name": f"{facts['name']}-m{config['member']}"}
        )
        manifest = load_manifest(Path(recipe.data.store))
        leaf = stage_folders(Path(facts["runs"]), recipe, manifest)[-1]
        job = {"do": "train", "recipe": recipe.model_dump(mode="json"), "root": facts["runs"]}
        job |= {} if math.isinf(seconds) else {"max_seconds": max(1.0, seconds)}
        rest = {key: facts[key] for key in ("sweep", "ranks", "threads", "on", "options")}
        place = {
            "node": leaf.path.name,
            "path": str(leaf.path),
            "begin": 0,
            "start": 0,
            "trunk": None,
        }
        place["steps"] = stage_steps(recipe, manifest)[-1]
        while (result := perform({"job": job, **place, **rest}, lambda _: None))["state"] == "busy":
            time.sleep(1.0)
        if result["state"] == "stopped":
            return
        if result["state"] == "failed":
            raise RuntimeError(result["message"])
        summary = evaluation_of(leaf.path)["summary"]
        write_atomically(Path(facts["sweep"]) / MEMBERS / f"{trial}.json", json.dumps(stages))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "stages.json").write_text(json.dumps(stages))
            dice = summary["mean_foreground_dice"] or 0.0
            tune.report(
                {"dice": dice, "generation": len(stages)},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )
