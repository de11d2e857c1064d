"""From a raw folder to a published store: survey, plan, shards in parallel, manifest, one rename.

Everything is made in `OUT.partial` beside `OUT`. What is finished there carries a record of what it was made from, so a run that was killed
goes on with what is missing, and a changed plan or source invalidates just what depends on it. `OUT` appears complete or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segfleet.preprocess.check import Survey, memory_of, survey
from segfleet.preprocess.chunks import chunk_of
from segfleet.preprocess.digest import content_sha256
from segfleet.preprocess.fingerprint import CaseFacts, Fingerprint, fingerprint
from segfleet.preprocess.manifest import NAME as MANIFEST
from segfleet.preprocess.manifest import (
    CaseEntry,
    Dataset,
    Manifest,
    Plan,
    content_id,
    load_manifest,
    save_manifest,
    sync_folder,
    write_atomically,
)
from segfleet.preprocess.parallel import run
from segfleet.preprocess.plan import make_plan
from segfleet.preprocess.problems import InputError
from segfleet.preprocess.readers.base import CaseRef, RawReader, open_reader, source_sha256
from segfleet.preprocess.splits import Member, make_splits
from segfleet.preprocess.stores.base import store_module
from segfleet.preprocess.transforms import preprocess_case, stored_grid

SPLIT_SEED = 12345
SHARD_BYTES = 16 * 2**20  # cases share a shard until it holds this much
STATE = ".state"  # inside OUT.partial: records of what is finished
REVISION = 1  # of the transforms: another one makes finished shards of a killed run void
Progress = Callable[[str, int, int], None]  # phase ("check" | "write" | "compare"), done, total


def build(
    reader_name: str,
    raw: str | Path,
    out: str | Path,
    format: str = "zarr",
    workers: int | None = None,
    split_seed: int = SPLIT_SEED,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Preprocess the raw data set in `raw` into the store `out`, or find that this has been done.

    The result's bytes do not depend on `workers`. Raises InputError: DataError with every problem of the data, no space, `out` taken.
    """
    out, tell = Path(out), progress or (lambda phase, done, total: None)
    store_module(format)
    reader = open_reader(reader_name, raw)
    if (out / MANIFEST).is_file():
        return compare(reader, out, format=format, split_seed=split_seed, workers=workers, progress=tell)
    _check_place(out, reader.root)
    partial = out.with_name(out.name + ".partial")
    with _claimed(partial, out):
        facts = _survey(reader, partial, workers, tell)
        found = fingerprint(facts.dataset, facts.facts, split_seed)
        plan = make_plan(facts.dataset, found)
        jobs = shard_jobs(reader, facts, plan, format, partial, shard_bytes)
        entries, files = _write(jobs, partial, workers, tell)
        manifest = Manifest(
            format=format,
            id=content_id(facts.dataset, plan, entries),
            dataset=facts.dataset,
            plan=plan,
            fingerprint=found.model_dump(mode="json"),
            cases=entries,
            splits=make_splits(_members(facts.facts, facts.dataset), split_seed, reader.splits()),
            split_seed=split_seed,
            files=files,
        )
        save_manifest(partial, manifest)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
        sync_folder(out.parent)
        shutil.rmtree(out / STATE)
    return load_manifest(out)


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """All that a worker needs to make one shard. `key` is the hash of everything that determines its content."""

    reader: RawReader
    refs: tuple[CaseRef, ...]
    sources: tuple[str, ...]
    dataset: Dataset
    plan: Plan
    format: str
    root: Path
    shard: str
    chunk: tuple[int, int, int]
    stored_bytes: int
    key: str

    @property
    def record(self) -> Path:
        return self.root / STATE / "done" / f"{Path(self.shard).name}.json"


def shard_jobs(reader: RawReader, facts: Survey, plan: Plan, format: str, root: Path, shard_bytes: int) -> list[ShardJob]:
    """Cases in their order, as many in a shard as fit."""
    channels, width = len(plan.normalisation), np.dtype(plan.dtype).itemsize
    chunk = chunk_of(plan.patch, plan.median_shape, channels * width)
    bundles: list[list[int]] = []
    sizes: list[int] = []
    for index, case in enumerate(facts.facts):
        shape, _ = stored_grid(case.crop_shape, case.spacing, plan)
        truth = int(np.prod(case.raw_shape)) if shape != case.raw_shape else 0
        size = int(np.prod(shape)) * (channels * width + 1) + truth
        if bundles and sizes[-1] + size <= shard_bytes:
            bundles[-1].append(index)
            sizes[-1] += size
        else:
            bundles.append([index])
            sizes.append(size)
    jobs = []
    for number, (bundle, size) in enumerate(zip(bundles, sizes, strict=True)):
        refs = tuple(facts.refs[index] for index in bundle)
        sources = tuple(facts.facts[index].source_sha256 for index in bundle)
        cases = [(ref.id, ref.group, source) for ref, source in zip(refs, sources, strict=True)]
        content = [REVISION, facts.dataset.model_dump(mode="json"), plan.model_dump(mode="json"), format, chunk, cases]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        jobs.append(
            ShardJob(
                reader=reader,
                refs=refs,
                sources=sources,
                dataset=facts.dataset,
                plan=plan,
                format=format,
                root=root,
                shard=f"shards/{number:05d}",
                chunk=chunk,
                stored_bytes=size,
                key=key,
            )
        )
    return jobs


def write_shard(job: ShardJob) -> dict:
    """Make one shard and leave its record. Nothing of it remains if that fails. Raises an error that names the case."""
    writer = store_module(job.format).Writer(job.root, job.shard, chunk=job.chunk, dtype=job.plan.dtype)
    try:
        entries = [_write_case(writer, job, number) for number in range(len(job.refs))]
        files = writer.publish()
    except BaseException:
        writer.abandon()
        raise
    record = {"key": job.key, "cases": [entry.model_dump(mode="json") for entry in entries], "files": files}
    write_atomically(job.record, json.dumps(record))
    return record


def _write_case(writer, job: ShardJob, number: int) -> CaseEntry:
    ref, key = job.refs[number], f"case{number:05d}"
    try:
        case = job.reader.read(ref)
        if case.extra["source_sha256"] != job.sources[number]:
            raise InputError(f"case '{ref.id}': its files changed while they were preprocessed. Run the same command again.")
        image, label, facts = preprocess_case(case, job.plan, ignore_label=job.dataset.ignore_label)
        truth = np.ascontiguousarray(case.label_ZYX, np.uint8) if facts["has_truth"] else None
        writer.write(key, image, label, truth)
    except (InputError, OSError):
        raise
    except Exception as error:
        raise RuntimeError(f"case '{ref.id}': {type(error).__name__}: {error}") from error
    return CaseEntry(
        id=ref.id,
        group=case.patient,
        shard=job.shard,
        key=key,
        sha256=content_sha256(image, label),
        source_sha256=case.extra["source_sha256"],
        image_file=case.extra["files"][0],
        **facts,
    )


def compare(reader: RawReader, out: Path, *, format: str, split_seed: int, workers: int | None, progress: Progress) -> Manifest:
    """The manifest of a finished store, if it is what `build` would make of `reader`'s files today.

    Raises InputError that names what differs; published stores are never changed.
    """
    manifest = load_manifest(out)
    refs = reader.refs()
    hashes: dict[str, str] = {}
    for index, found in run(_source, refs, weights=[0] * len(refs), names=[ref.id for ref in refs], workers=workers):
        hashes[refs[index].id] = found
        progress("compare", len(hashes), len(refs))
    stored = {entry.id: entry.source_sha256 for entry in manifest.cases}
    differences = []
    if manifest.format != format:
        differences.append(f"format {manifest.format}, now {format}")
    if manifest.split_seed != split_seed:
        differences.append(f"split seed {manifest.split_seed}, now {split_seed}")
    if changed := [case for case in sorted({*stored, *hashes}) if stored.get(case) != hashes.get(case)]:
        differences.append(f"raw files of {len(changed)} case(s): {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}")
    elif manifest.dataset != reader.dataset():
        differences.append("the description of the data set")
    elif manifest.plan != make_plan(manifest.dataset, Fingerprint.model_validate(manifest.fingerprint)):
        differences.append("the plan")
    if differences:
        raise InputError(
            f"out: {out} is a finished store made from something else: {'; '.join(differences)}. "
            "Published stores are never changed: choose another --out, or remove that folder."
        )
    if (out / STATE).is_dir():  # killed between publishing and tidying up
        shutil.rmtree(out / STATE)
    return manifest


def _source(ref: CaseRef) -> str:
    try:
        return source_sha256(ref)
    except FileNotFoundError:
        return ""


def _survey(reader: RawReader, partial: Path, workers: int | None, tell: Progress) -> Survey:
    """The one pass over the raw files; its facts are written down as they come, so a killed run need not look twice."""
    journal = partial / STATE / "survey.jsonl"
    known = list(_journal(journal))
    with open(journal, "a", encoding="utf-8") as file:

        def keep(facts: CaseFacts) -> None:
            if not facts.problems:
                file.write("\n" + facts.model_dump_json())
                file.flush()

        facts = survey(reader, workers=workers, progress=lambda done, total: tell("check", done, total), known=known, keep=keep)
    facts.raise_problems()
    return facts


def _journal(path: Path) -> Iterator[CaseFacts]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield CaseFacts.model_validate_json(line)
            except ValueError:
                continue  # the line the killed process was writing


def _write(jobs: Sequence[ShardJob], partial: Path, workers: int | None, tell: Progress) -> tuple[tuple[CaseEntry, ...], dict]:
    records = [_finished(job) for job in jobs]
    todo = [index for index, record in enumerate(records) if record is None]
    _tidy(partial, [record for record in records if record])
    total = sum(len(job.refs) for job in jobs)
    done = total - sum(len(jobs[index].refs) for index in todo)
    tell("write", done, total)
    weights = [max(memory_of(ref) for ref in jobs[index].refs) for index in todo]
    try:
        for position, record in run(
            write_shard, [jobs[i] for i in todo], weights=weights, names=[f"{jobs[i].refs[0].id} ..." for i in todo], workers=workers
        ):
            records[todo[position]] = record
            done += len(jobs[todo[position]].refs)
            tell("write", done, total)
    except OSError as error:
        if not _is_full(error):
            raise
        missing = [index for index in todo if records[index] is None]
        needed, free = sum(jobs[i].stored_bytes for i in missing), shutil.disk_usage(partial).free
        raise InputError(
            f"out: no space left in {partial.parent}: the remaining {sum(len(jobs[i].refs) for i in missing)} case(s) need about "
            f"{_bytes(needed)}, {_bytes(free)} are free. Free some and run the same command again: finished cases are kept."
        ) from None
    entries = tuple(CaseEntry.model_validate(case) for record in records for case in record["cases"])
    return entries, {path: facts for record in records for path, facts in record["files"].items()}


def _finished(job: ShardJob) -> dict | None:
    """The record of a shard that is complete and made from what is there now."""
    try:
        record = json.loads(job.record.read_text(encoding="utf-8"))
        whole = all((job.root / path).stat().st_size == facts["bytes"] for path, facts in record["files"].items())
        return record if record["key"] == job.key and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tidy(partial: Path, records: Sequence[dict]) -> None:
    """Remove shards that no valid record speaks for."""
    kept = {Path(path).parts[1] for record in records for path in record["files"]}
    for path in (partial / "shards").glob("*"):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _members(facts: Sequence[CaseFacts], dataset: Dataset) -> list[Member]:
    return [Member(id=case.id, group=case.group or case.id, foreground=case.foreground(dataset.ignore_label)) for case in facts]


def _check_place(out: Path, raw: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out: {out} exists and is neither an empty folder nor a store. Choose another --out.")
    if out.resolve() == raw.resolve() or out.resolve() in raw.resolve().parents:
        raise InputError(f"out: {out} is the raw data's own folder. Choose another --out.")


@contextmanager
def _claimed(partial: Path, out: Path):
    """Hold OUT.partial for this process alone. The claim ends with the process, however that ends."""
    (partial / STATE / "done").mkdir(parents=True, exist_ok=True)
    with open(partial / STATE / "claim", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"out: another process is preprocessing into {out}. Wait for it, or choose another --out.") from None
        try:
            yield
        finally:
            if partial.exists() and not any((partial / STATE / "done").iterdir()) and not _written(partial / STATE / "survey.jsonl"):
                shutil.rmtree(partial)


def _written(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
