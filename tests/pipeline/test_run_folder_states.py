"""A stage's folder under any order of saves, kills in the middle of one, damage, pruning, ends and
restarts: what is read is what was written, and the latest that is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from segfleet.core import files, partial
from segfleet.pipeline import checkpoint
from segfleet.pipeline.run import StageFolder, lock_stage
from segfleet.pipeline.scoring import scored
from tests.states import damage, until


class Killed(BaseException):
    """Nothing of the process goes on after it, not even what tidies up."""


class StageMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="states-")) / "0123456789ab"
        self.root.mkdir()
        self.stage = StageFolder(path=self.root, index=0)
        self.whole: set[int] = set()  # steps whose checkpoint is there and undamaged
        self.score: float | None = None
        self.end: int | None = None
        self.step = 0

    def tensors(self, step: int) -> dict:
        return {"weights": {"w": torch.full((8,), float(step))}, "ema": {}}

    def saved(self, step: int) -> None:
        checkpoint.save(self.stage.checkpoints, step, self.tensors(step), {"of": step})

    @rule()
    def save(self) -> None:
        self.step += 1
        self.saved(self.step)
        self.whole.add(self.step)

    @rule(after=st.integers(0, 8))
    def die_while_saving(self, after: int) -> None:
        """A process of its own, whose number nobody has any more when it is looked for."""
        self.step += 1
        child = os.fork()
        if child == 0:
            count = [after]
            for name in ("fsync", "replace"):
                setattr(os, name, until(getattr(os, name), count))
            try:
                self.saved(self.step)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        if (self.stage.checkpoints / checkpoint.folder_name(self.step)).exists():
            self.whole.add(self.step)  # published in the last moment: then it must be whole

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "empty", "gone"]))
    def damage(self, data, how: str) -> None:
        step = data.draw(st.sampled_from(sorted(self.whole)))
        folder = self.stage.checkpoints / checkpoint.folder_name(step)
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        damage(path, how)
        self.whole.discard(step)

    @precondition(lambda self: len(self.whole) > 2)
    @rule()
    def prune(self) -> None:
        there = [int(path.name[5:]) for path in checkpoint.steps(self.stage.checkpoints)]
        checkpoint.prune(self.stage.checkpoints, 2)
        self.whole &= set(there[-2:])

    @precondition(lambda self: self.whole)
    @rule()
    def finish(self) -> None:
        step = max(self.whole)
        self.stage.finish(checkpoint.folder_name(step), steps=step, best={}, skipped=0)
        self.end = step

    @precondition(lambda self: self.end is not None)
    @rule(how=st.sampled_from(["cut", "empty", "gone", "other"]))
    def damage_the_end(self, how: str) -> None:
        self._spoil(self.root / "done.json", how)
        self.end = None

    @rule(value=st.floats(0, 1))
    def evaluate(self, value: float) -> None:
        scored.write_evaluation(self.root, {"summary": {"mean_foreground_dice": value}})
        self.score = value

    @precondition(lambda self: self.score is not None)
    @rule(how=st.sampled_from(["cut", "empty", "gone", "other"]))
    def damage_the_score(self, how: str) -> None:
        self._spoil(self.root / scored.EVALUATION, how)
        self.score = None

    def _spoil(self, path: Path, how: str) -> None:
        if how == "other":  # another run's, whole
            other = self.root.parent / "ba9876543210"
            other.mkdir(exist_ok=True)
            files.write_json(other / path.name, files.read_json(path))
            shutil.copy(other / path.name, path)
        else:
            damage(path, how)

    @rule()
    def restart(self) -> None:
        lock = lock_stage(self.root)
        checkpoint.clean(self.stage.checkpoints)
        partial.remove_partial(self.root, alone=True)
        lock.release()
        assert not list(self.root.rglob("*.partial*"))

    @invariant()
    def what_is_read_is_what_was_written(self) -> None:
        if not hasattr(self, "root"):
            return
        found = checkpoint.latest(self.stage.checkpoints, lambda message: None)
        assert (found.step if found else None) == max(self.whole, default=None)
        if found:
            assert found.state["of"] == found.step
            assert found.tensors("weights")["w"].tolist() == [float(found.step)] * 8
        done = self.stage.done()
        assert (done and int(done["checkpoint"][5:])) == self.end
        document = scored.read_evaluation(self.root)
        assert (document and document["summary"]["mean_foreground_dice"]) == self.score

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root.parent)


TestStage = StageMachine.TestCase
TestStage.settings = settings(
    max_examples=10,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
