"""A store under any order of builds, kills in the middle of one, changed raw files and damage to
what is half made and to what is finished: it is whole and of the raw files it says, or it is
refused."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from segfleet.core.errors import InputError
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import write_msd_phantom
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.content import content_sha256
from segfleet.preprocess.stores.verify import verify
from tests.states import damage, until

DAMAGE = st.sampled_from(["flip", "cut", "empty", "gone"])


@functools.cache
def world() -> Path:
    """Two versions of raw files, and what each makes in each format."""
    place = Path(tempfile.mkdtemp(prefix="worlds-"))
    for version in (0, 1):
        raw = write_msd_phantom(
            place / f"raw{version}" / "msd", cases=3, seed=version, size=(4, 12, 12)
        )
        for format in ("zarr", "hdf5"):
            build(BuildRequest("msd", raw, place / f"{format}{version}", format=format, workers=1))
    return place


@functools.cache
def right(format: str, version: int) -> tuple[str, tuple[str, ...]]:
    """The id of the store and the hashes of its cases' content."""
    store = open_store(world() / f"{format}{version}")
    return store.manifest.id, tuple(content_sha256(*store.stored(c)) for c in store.manifest.cases)


class StoreMachine(RuleBasedStateMachine):
    @initialize(format=st.sampled_from(["zarr", "hdf5"]))
    def begin(self, format: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="states-"))
        self.raw, self.out = self.root / "msd", self.root / "store"
        self.partial = self.root / "store.partial"
        shutil.copytree(world() / "raw0" / "msd", self.raw)
        self.format, self.version = format, 0
        self.made_of: int | None = None  # the raw files' version, of a published store
        self.damaged = False

    def build(self) -> str:
        return build(BuildRequest("msd", self.raw, self.out, format=self.format, workers=1)).id

    @rule()
    def make(self) -> None:
        try:
            made = self.build()
        except InputError:
            assert self.damaged or self.made_of == 1 - self.version
            return
        assert made == right(self.format, self.version)[0]
        self.made_of = self.version

    @precondition(lambda self: self.made_of is None)
    @rule(after=st.integers(0, 25))
    def die_while_making(self, after: int) -> None:
        child = os.fork()
        if child == 0:
            count = [after]
            for name in ("fsync", "replace", "rename", "unlink"):
                setattr(os, name, until(getattr(os, name), count))
            try:
                self.build()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        if (self.out / "manifest.json").exists():  # published in the last moment: then it is whole
            self.made_of = self.version

    @rule()
    def change_the_raw_files(self) -> None:
        self.version = 1 - self.version
        shutil.copytree(world() / f"raw{self.version}" / "msd", self.raw, dirs_exist_ok=True)

    @precondition(lambda self: self.partial.is_dir())
    @rule(data=st.data(), how=DAMAGE)
    def damage_what_is_half_made(self, data, how: str) -> None:
        files = sorted(path for path in self.partial.rglob("*") if path.is_file())
        if files:
            damage(data.draw(st.sampled_from(files)), how)

    @precondition(lambda self: self.made_of is not None)
    @rule(data=st.data(), how=DAMAGE)
    def damage_the_store(self, data, how: str) -> None:
        files = sorted(path for path in self.out.rglob("*") if path.is_file())
        damage(data.draw(st.sampled_from(files)), how)
        self.damaged = True

    @precondition(lambda self: self.made_of is not None)
    @rule()
    def remove(self) -> None:
        shutil.rmtree(self.out)
        self.made_of, self.damaged = None, False

    @invariant()
    def a_store_is_whole_or_refused(self) -> None:
        if not hasattr(self, "root") or self.made_of is None:
            return
        wanted = right(self.format, self.made_of)
        try:
            store = open_store(self.out)
            found = tuple(content_sha256(*store.stored(case)) for case in store.manifest.cases)
            truths = [store.truth(case) for case in store.manifest.cases if case.has_truth]
            assert (store.manifest.id, found) == wanted and truths
        except InputError:
            assert self.damaged
        if not self.damaged:
            assert verify(self.out, chunks=True) == []
            assert not self.partial.exists()

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=5,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
