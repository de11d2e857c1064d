"""A run's score: whole cases of the validation fold at their original resolution, shared out among
the ranks."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_atomically
from segfleet.core.lock import is_locked
from segfleet.models import registry
from segfleet.pipeline import checkpoint
from segfleet.pipeline.devices import numerics, out_of_memory
from segfleet.pipeline.engines.base import Engine, autocast
from segfleet.pipeline.engines.common import load_weights
from segfleet.pipeline.inference.sliding_window import Window
from segfleet.pipeline.parts import (
    Objective,
    build_network,
    channels_last,
    in_layout,
    patch_of,
    task_of,
)
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.run import LOCK, StageFolder, lock_stage
from segfleet.pipeline.scoring import scored
from segfleet.pipeline.scoring.evaluate import CaseJournal, Measures, evaluate_cases
from segfleet.pipeline.scoring.external import TestSet, overlap_with_training
from segfleet.pipeline.stop import Interrupted, StopRequest
from segfleet.pipeline.task import RECONSTRUCT, Task
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.stores.manifest import Manifest

EVALUATION = scored.EVALUATION
# {"phase": validation | scoring | report, "done", "total"} of rank 0, while that lasts
SCORING = "scoring.json"
REPORTING = "report"
SHOWN = 3  # validation cases that are drawn while training, the same ones always
CASES = "scored"  # a folder of the cases that are scored already, while it lasts


def forward_of(
    model: nn.Module, task: Task, recipe: Recipe, device: torch.device, *, logits: bool = False
) -> Callable[[Tensor], Tensor]:
    """`forward(image) -> probabilities` (or logits, by `task.averages`), with the recipe's
    precision and memory format, without gradients. With `logits`, (B, 2K, *S): the logits follow
    the probabilities."""

    @torch.no_grad()
    def forward(image: Tensor) -> Tensor:
        image = image.to(device)
        if channels_last(recipe, device, flat=image.ndim == 4):
            image = image.contiguous(
                memory_format=torch.channels_last if image.ndim == 4 else torch.channels_last_3d
            )
        with autocast(recipe.engine.precision, device):
            output = model(image)
        output = output[0] if isinstance(output, list | tuple) else output
        scores = task.scores(output)
        return torch.cat([scores, output.float()], 1) if logits else scores

    return forward


def chosen_checkpoint(recipe: Recipe, folders: list[StageFolder]) -> checkpoint.Checkpoint:
    """The checkpoint a run is judged by: the last one, or the best on validation if the recipe says
    so."""
    last = folders[-1].final()
    chosen = folders[-1].checkpoints / checkpoint.folder_name(
        scored.chosen_step(recipe, folders[-1].done())
    )
    return last if chosen == last.path else folders[-1].load(chosen.name)


def load_network(
    recipe: Recipe, manifest: Manifest, folders: list[StageFolder], device: torch.device
) -> tuple[nn.Module, Task, str]:
    """The trained network in eval mode, averaged weights if there are any; its task; the
    checkpoint's folder name."""
    task = task_of(recipe, manifest)
    if task.head == RECONSTRUCT:
        raise InputError(
            f"run: {folders[-1].path.name} ends with a reconstruction, which names no structure; "
            "train a stage of `task: segment` after it"
        )
    saved = chosen_checkpoint(recipe, folders)
    model = with_weights(recipe, manifest, averaged(saved), str(saved.path), device)
    return model, task, saved.path.name


def averaged(saved: checkpoint.Checkpoint) -> dict[str, Tensor]:
    """The weights that are judged: averaged ones where there are any."""
    ema = saved.tensors("ema")
    return {**saved.tensors("weights", without=ema), **ema}


def with_weights(
    recipe: Recipe,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    where: str,
    device: torch.device,
) -> nn.Module:
    """The recipe's network with these weights, in eval mode on the device. Raises CheckpointError
    that says `where` they are from, if they do not fit."""
    model = build_network(recipe, manifest, task_of(recipe, manifest))
    load_weights(model, tensors, where)
    numerics.arrange(recipe.engine, device)
    return in_layout(model.to(device), recipe, manifest).eval()


def nothing(*_: Any) -> None:
    """Where no pictures and no report are wanted."""


@contextmanager
def locked(leaf: Path, ranks: Ranks) -> Iterator[None]:
    """One evaluation of a run at a time: two would mix their files. Raises InputError on every
    rank."""
    lock, refusal = None, None
    if ranks.rank == 0:
        try:
            lock = lock_stage(leaf)
        except InputError as error:
            refusal = str(error)
    if refusal := ranks.share(refusal):
        raise InputError(refusal)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores networks of one run. `draw` gets an evaluation with what was kept of its predictions;
    `report` gets the folder of a finished one. `picture(store, id, z, labels_YX, task)`: (Y, X, 3)
    uint8 of a case while training, for SHOWN of them."""

    recipe: Recipe
    store: ShardStore
    ranks: Ranks
    stop: StopRequest
    draw: Callable[..., Any] = nothing
    report: Callable[[Path], Any] = nothing
    leaf: Path | None = None  # folder of the run, where the progress of a phase is noted
    picture: Callable[..., np.ndarray] | None = None

    def validate(self, engine: Engine) -> dict[str, Any]:
        """Scores while training: {"dice": mean over structures and cases, "dice_<structure>": ...,
        "iou_pooled": of all voxels at the stored size, mean over structures, "loss": mean over
        cases}; the same on every rank, and on rank 0 "pictures": {name: pixels}. Raises
        Interrupted on every rank when one is asked to stop."""
        task, slices = task_of(self.recipe, self.store.manifest), []
        with self._memory(), engine.evaluation() as model:
            ids = self._ids()[: self.recipe.evaluation.cases]
            shown = set(ids[:SHOWN]) if self.picture else set()
            forward = forward_of(model, task, self.recipe, self.ranks.device, logits=True)
            document = evaluate_cases(
                forward,
                self.store,
                ids,
                task,
                self._window(),
                Measures(distances=False, objective=Objective(self.recipe, task)),
                ranks=self.ranks,
                progress=functools.partial(self._on_progress, "validation"),
                show=lambda case, z, label: (
                    slices.append((case, z, label.tolist())) if case in shown else None
                ),
            )
        self._note(None)
        gathered = [entry for part in self.ranks.gather(slices) for entry in part]
        structures = document["summary"]["structures"]
        pooled = [s["pooled"]["pooled_at_stored_size"].get("iou") for s in structures.values()]
        defined = [iou for iou in pooled if iou is not None]
        return {
            "dice": document["summary"]["mean_foreground_dice"],
            **{f"dice_{name}": scores["dice"]["mean"] for name, scores in structures.items()},
            "iou_pooled": sum(defined) / len(defined) if defined else None,
            "loss": sum(case["loss"] for case in document["cases"]) / len(document["cases"]),
            "pictures": {
                f"validation/{case}": self.picture(
                    self.store, case, z, np.asarray(label, np.uint8), task
                )
                for case, z, label in (gathered if self.ranks.rank == 0 else ())
            },
        }

    def score(self, folders: list[StageFolder], again: bool = False) -> None:
        """Write evaluation.json, overlays and report of a finished run, unless exactly this score
        is there already."""
        leaf, manifest = folders[-1].path, self.store.manifest
        if again or not self.ranks.share(scored.is_scored(leaf, self.recipe, manifest)):
            with locked(leaf, self.ranks):
                self._score(folders)
        elif self.ranks.rank == 0:
            self._report_if_killed(leaf)
        if self.ranks.rank == 0:
            for sentence in scored.optimism(scored.evaluation_of(leaf)):
                sys.stderr.write(f"segfleet: {sentence}\n")

    def _report_if_killed(self, leaf: Path) -> None:
        """Report a score whose process was killed after it was written."""
        phase = (read_json(leaf / SCORING) or {}).get("phase")
        if phase != REPORTING and (leaf / scored.REPORT).exists():
            return
        if not is_locked(leaf / LOCK):  # whoever works there reports it, or another score
            with lock_stage(leaf):
                self.report(leaf)
                (leaf / SCORING).unlink(missing_ok=True)

    def _score(self, folders: list[StageFolder]) -> None:
        manifest, ids = self.store.manifest, self._ids()
        network = load_network(self.recipe, manifest, folders, self.ranks.device)
        identity = scored.score_facts(self.recipe, manifest, folders[-1].done())
        self._evaluate(
            folders[-1].path,
            network,
            ids,
            identity,
            lambda: {
                "split": self.recipe.data.split,
                "fold": self.recipe.data.fold,
                "training_cases": len(
                    manifest.fold(self.recipe.data.split, self.recipe.data.fold)["train"]
                ),
                "seen_in_training": scored.seen_in_training(ids, self.recipe, manifest),
                "selected_on_these_cases": self._selected(folders[-1], network[2]),
            },
            self._window(),
        )

    def score_on(self, folders: list[StageFolder], test: TestSet, trained: Manifest) -> Path:
        """Score a finished run on other cases, those of `test` in this scorer's store, into a
        folder of its own; `trained`: data set and plan of the run. Its evaluation.json names run
        and store.
        """
        run, ids = folders[-1].path, test.ids(self.store.manifest)
        test.check(self.recipe, trained, self.store.manifest)
        with locked(run, self.ranks):
            network = load_network(self.recipe, trained, folders, self.ranks.device)
            out = run / scored.EXTERNAL / test.folder(self.store.manifest)
            out.mkdir(parents=True, exist_ok=True)
            done, manifest = folders[-1].done(), self.store.manifest
            identity = scored.test_facts(run, self.recipe, manifest, done, test)
            extras = {
                "name": f"{self.recipe.name} on {self.store.manifest.dataset.name}",
                "split": test.split or "all cases",
                "fold": test.fold,
                **overlap_with_training(self.recipe, self.store.manifest, ids),
            }
            window = replace(self._window(), patch=patch_of(self.recipe, trained))
            self._evaluate(out, network, ids, identity, lambda: extras, window)
        return out

    def _evaluate(
        self,
        out: Path,
        network: tuple[nn.Module, Task, str],
        ids: list[str],
        identity: dict[str, Any],
        extras: Callable[[], dict[str, Any]],
        window: Window,
    ) -> None:
        """evaluation.json, pictures and report of the cases into `out`, with their `identity`."""
        model, task, name = network
        forward = forward_of(model, task, self.recipe, self.ranks.device)
        journal = CaseJournal(
            out / CASES, identity | {"versions": checkpoint.versions()}, self.ranks.rank
        )
        with self._memory():
            document = evaluate_cases(
                forward,
                self.store,
                ids,
                task,
                window,
                Measures(pool=self.recipe.data.batch, tolerance=self.recipe.evaluation.tolerance),
                ranks=self.ranks,
                progress=functools.partial(self._on_progress, "scoring"),
                journal=journal,
            )
        if self.ranks.rank == 0:
            document |= {
                "checkpoint": name,
                "parameters": registry.count_parameters(model),
                "versions": checkpoint.versions(),
                "scored": identity,
                **extras(),
            }
            self._note({"phase": REPORTING, "done": 0, "total": 2})
            self.draw(out, document, self.store, task, journal.slices)
            self._note({"phase": REPORTING, "done": 1, "total": 2})
            scored.write_evaluation(out, document)
            self.report(out)
            self._note(None)
            journal.forget()
        self.ranks.barrier()

    def _selected(self, folder: StageFolder, name: str) -> bool:
        """Whether the checkpoint that is scored was chosen for its score on some of the cases that
        are scored."""
        if self.recipe.evaluation.weights != "best" or not folder.done()["best"].get(
            self.recipe.evaluation.select
        ):
            return False
        saved = checkpoint.read(folder.checkpoints / name)
        try:  # maybe of another split
            data, cases = (
                saved.state["recipe"]["data"],
                saved.state["recipe"]["evaluation"]["cases"],
            )
            validated = sorted(self.store.manifest.fold(data["split"], data["fold"])["val"])[:cases]
        except (KeyError, TypeError) as error:
            raise checkpoint.CheckpointError(
                f"checkpoint: {saved.path} does not say in state.json what it was trained on "
                f"({error!r}); train the stage again"
            ) from None
        return not set(validated).isdisjoint(self._ids())

    def _ids(self) -> list[str]:
        return scored.scored_ids(self.recipe, self.store.manifest)

    def _window(self) -> Window:
        options = self.recipe.evaluation
        return Window(
            patch=patch_of(self.recipe, self.store.manifest),
            overlap=options.overlap,
            mirror_axes=options.mirror,
            batch=options.batch,
            device=self.ranks.device,
        )

    def _memory(self) -> AbstractContextManager[None]:
        patch = patch_of(self.recipe, self.store.manifest)
        words = out_of_memory.scoring_words(self.recipe, patch)
        return out_of_memory.named(self.ranks.device, words)

    def _on_progress(self, phase: str, done: int, total: int) -> None:
        """Progress of rank 0's cases for the log, and the moment at which a stop is
        obeyed."""
        self._note({"phase": phase, "done": done, "total": total})
        if self.stop.asked() and (phase == "scoring" or done < total):
            self._note(None)
            goal = "score" if phase == "scoring" else "go on"
            doing = "scoring" if phase == "scoring" else "validating"
            raise Interrupted(f"stopped while {doing}; run the same command again to {goal}")

    def _note(self, note: dict[str, Any] | None) -> None:
        """Rank 0 notes the present phase beside the run, or that it is over."""
        if self.ranks.rank == 0 and self.leaf is not None:
            if note is None:
                (self.leaf / SCORING).unlink(missing_ok=True)
            else:
                write_atomically(self.leaf / SCORING, json.dumps(note))
