"""From a raw folder to a published store: survey, plan, shards in parallel, manifest, one rename.

Everything is made in `OUT.partial` beside `OUT`. What is finished there carries a record of what it
was made from, so a run that was killed resumes with what is missing, and a changed plan or source
invalidates just what depends on it. `OUT` appears complete or not at all.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from segfleet.core.errors import DataError, InputError, Problem, check_one_of, explain
from segfleet.core.files import sync_folder
from segfleet.core.litter import remove_folders
from segfleet.core.parallel import run
from segfleet.preprocess.building.journal import Journals
from segfleet.preprocess.building.kept import cached_cases, settle
from segfleet.preprocess.building.lock import locked
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.building.shard_job import (
    STATE,
    ShardJob,
    finished,
    record_of,
    shard_jobs,
    write_shard,
)
from segfleet.preprocess.checking.check import Survey, guesses, memory_for, survey
from segfleet.preprocess.planning.fingerprint import Fingerprint, fingerprint
from segfleet.preprocess.planning.patients import Grouping
from segfleet.preprocess.planning.plan import make_plan
from segfleet.preprocess.planning.splits import OWN, Folds, Member, make_splits
from segfleet.preprocess.readers.base import CaseRef, RawReader, open_reader, source_sha256
from segfleet.preprocess.stores.base import store_module
from segfleet.preprocess.stores.case_table import CaseTable, TableBuilder
from segfleet.preprocess.stores.manifest import (
    CaseEntry,
    Manifest,
    is_published,
    load_manifest,
    save_manifest,
)
from segfleet.preprocess.stores.packed import CODECS
from segfleet.preprocess.stores.verify import verify

Report = Callable[[Grouping, Sequence[Problem]], None]
Progress = Callable[[str, int, int], None]  # phase ("check" | "write" | "compare"), done, total


def no_progress(phase: str, done: int, total: int) -> None:
    """The progress callback where progress is not shown."""


def build(
    request: BuildRequest,
    *,
    quick: bool = False,
    progress: Progress = no_progress,
    report: Report = lambda grouping, warnings: None,
) -> Manifest:
    """Preprocess a raw data set into a store, or find that this has been done.

    A finished store's files are compared with their hashes, or `quick`ly: their sizes, and the
    hashes of those that changed after the manifest. `report` gets how cases came to their
    patients, and every warning of the check. Raises InputError: DataError with every problem of the
    data, no space, `out` taken.
    """
    out, reader = request.out, open_raw(request)
    remove_folders()  # also where nothing is left to do
    if is_published(out):
        report(reader.grouping, guesses(reader.grouping))
        return compare(reader, request, quick=quick, progress=progress)
    partial = request.partial
    with locked(partial, out):
        surveyed = _survey(reader, partial, request.workers, progress)
        report(surveyed.grouping, surveyed.warnings)
        measured = fingerprint(surveyed.dataset, surveyed.facts, request.split_seed)
        plan = make_plan(surveyed.dataset, measured, overrides=request.overrides)
        jobs = shard_jobs(reader, surveyed, plan, request)
        _write(jobs, partial, request.workers, progress)
        pixels = {case.id: case.image_sha256 for case in surveyed.facts}
        cases, files = _written(jobs, pixels)
        patients = _patients(surveyed.refs)
        manifest = Manifest(
            format=request.format,
            codec=request.codec,
            dataset=surveyed.dataset,
            plan=plan,
            fingerprint=measured.model_dump(mode="json"),
            cases=cases,
            splits=make_splits(_members(surveyed), request.split_seed, reader.splits()),
            split_seed=request.split_seed,
            joined={
                case: patient
                for case, patient in _patients(reader.refs()).items()
                if patient != patients[case]
            },
            files=files,
        )
        save_manifest(partial, manifest)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
        sync_folder(out.parent)
        shutil.rmtree(out / STATE)
    return load_manifest(out)


def open_raw(request: BuildRequest) -> RawReader:
    """The reader, after every check that looks into no image. Raises InputError."""
    out = request.out
    if out.name in ("", ".."):
        raise InputError(f"out: found '{out}', expected the name of a folder that is made anew")
    store_module(request.format)
    check_one_of("codec", request.codec, CODECS)
    reader = open_reader(request.reader_name, request.raw, **request.options)
    request.overrides.check(reader.dataset())
    if not is_published(out):
        _check_place(out, reader.root)
    return reader


def compare(
    reader: RawReader, request: BuildRequest, *, quick: bool, progress: Progress
) -> Manifest:
    """The manifest of a finished store, if it is what `build` would make of `reader`'s files today.

    Raises InputError that names what differs; published stores are never changed.
    """
    out = request.out
    manifest = load_manifest(out)
    refs = reader.refs()
    hashes: dict[str, str] = {}
    progress("compare", 0, len(refs))
    for index, sha256 in run(
        _source,
        refs,
        weights=[0] * len(refs),
        names=[ref.id for ref in refs],
        workers=request.workers,
    ):
        hashes[refs[index].id] = sha256
        progress("compare", len(hashes), len(refs))
    stored = dict(manifest.cases.columns("id", "source_sha256"))
    differences = []
    for name, then, now in (
        ("format", manifest.format, request.format),
        ("codec", manifest.codec, request.codec),
        ("split seed", manifest.split_seed, request.split_seed),
    ):
        if then != now:
            differences.append(f"{name} {then}, now {now}")
    if changed := [
        case for case in sorted({*stored, *hashes}) if stored.get(case) != hashes.get(case)
    ]:
        differences.append(f"raw files of {len(changed)} case(s): {_few(changed)}")
    elif manifest.dataset != reader.dataset():
        differences.append("the description of the data set")
    elif manifest.plan != make_plan(
        manifest.dataset,
        Fingerprint.model_validate(manifest.fingerprint),
        overrides=request.overrides,
    ):
        differences.append("the plan")
    if not changed:
        differences += _regrouped(manifest, _patients(refs)) + _resplit(manifest, reader.splits())
    if differences:
        raise InputError(
            f"out: {out} is a finished store made from something else: {'; '.join(differences)}. "
            "Published stores are never changed: choose another --out, or remove that folder."
        )
    if problems := verify(out, quick=quick):
        raise DataError(str(out), problems)
    if (out / STATE).is_dir():  # killed between publishing and tidying up
        shutil.rmtree(out / STATE)
    return manifest


def _patients(refs: Sequence[CaseRef]) -> dict[str, str]:
    return {ref.id: ref.group or ref.id for ref in refs}


def _regrouped(manifest: Manifest, now: Mapping[str, str]) -> list[str]:
    """What differs in who is whose patient. Stores that do not record joined patients show only
    that one was divided."""
    stored = dict(manifest.cases.columns("id", "group"))
    if manifest.joined is None:
        homes: dict[str, set[str]] = {}
        for case, patient in now.items():
            homes.setdefault(patient, set()).add(stored[case])
        moved = [case for case, patient in now.items() if len(homes[patient]) > 1]
    else:
        then = {**stored, **manifest.joined}
        moved = [case for case, patient in now.items() if then[case] != patient]
    return [f"patients of {len(moved)} case(s): {_few(moved)}"] if moved else []


def _resplit(manifest: Manifest, brought: Mapping[str, Folds]) -> list[str]:
    """What differs in the splits the data set comes with; the others follow from patients, files
    and seed."""
    then, now = (
        {
            name: [{side: list(ids) for side, ids in fold.items()} for fold in folds]
            for name, folds in splits.items()
            if name not in OWN
        }
        for splits in (manifest.splits, brought)
    )
    words = {
        name: "new" if name not in then else "gone" if name not in now else "changed"
        for name in {**then, **now}
    }
    return [
        f"split {name}: {word}" for name, word in words.items() if then.get(name) != now.get(name)
    ]


def _few(cases: Sequence[str]) -> str:
    return f"{', '.join(cases[:5])}{' ...' if len(cases) > 5 else ''}"


def _source(ref: CaseRef) -> str:
    try:
        return source_sha256(ref)
    except FileNotFoundError:
        return ""


def _survey(reader: RawReader, partial: Path, workers: int | None, progress: Progress) -> Survey:
    """The one pass over the raw files; its facts are written down as they come, so a killed run
    need not look twice."""
    journals = Journals(reader, partial)
    with journals.append() as keep:
        own, earlier = journals.read(), cached_cases(reader)
        surveyed = survey(
            reader,
            workers=workers,
            progress=lambda done, total: progress("check", done, total),
            known=[*own, *earlier],
            keep=keep,
        )
        if earlier and not surveyed.problems:  # the journal alone speaks for what is written next
            written = {case.stamp for case in journals.read()}
            for case in surveyed.facts:
                if case.stamp not in written:
                    keep(case)
    settle(reader, surveyed)
    if surveyed.problems:
        journals.remove()
        surveyed.raise_problems()
    return surveyed


def _write(
    jobs: Sequence[ShardJob], partial: Path, workers: int | None, progress: Progress
) -> None:
    """Make every shard that is not there; each leaves its record."""
    records = [finished(job) for job in jobs]  # the files of a shard, None: to be made
    todo = [index for index, record in enumerate(records) if record is None]
    _tidy(partial, [record for record in records if record])
    total = sum(len(job.refs) for job in jobs)
    done = total - sum(len(jobs[index].refs) for index in todo)
    progress("write", done, total)
    weights = [weight_of(jobs[index]) for index in todo]
    failed: dict[int, Exception] = {}
    try:
        for position, record in run(
            attempt,
            [jobs[i] for i in todo],
            weights=weights,
            names=[f"{jobs[i].refs[0].id} ..." for i in todo],
            workers=workers,
            died=died,
        ):
            if isinstance(record, Exception):
                failed[todo[position]] = record
                continue
            records[todo[position]] = record
            done += len(jobs[todo[position]].refs)
            progress("write", done, total)
    except OSError as error:
        if not _is_full(error):
            raise
        missing = [index for index in todo if records[index] is None]
        needed, free = sum(jobs[i].stored_bytes for i in missing), shutil.disk_usage(partial).free
        raise InputError(
            f"out: no space left in {partial.parent}: the remaining "
            f"{sum(len(jobs[i].refs) for i in missing)} case(s) need about "
            f"{_bytes(needed)}, {_bytes(free)} are free. Free some and run the same command "
            "again: finished cases are kept."
        ) from None
    if failed:
        raise failure([(jobs[index], failed[index]) for index in sorted(failed)])


def _written(
    jobs: Sequence[ShardJob], pixels: Mapping[str, str]
) -> tuple[CaseTable, dict[str, dict]]:
    """Cases and files of all shards, from their records, one after the other."""
    table, files = TableBuilder(), dict[str, dict]()
    for job in jobs:
        record = record_of(job)
        for case in record["cases"]:
            table.add(CaseEntry.model_validate({**case, "image_sha256": pixels[case["id"]]}))
        files |= record["files"]
    return table.table(), files


def attempt(job: ShardJob) -> dict | Exception:
    """The files of a shard, or why there are none: one that fails does not keep the others from
    being made. A full disk is raised."""
    try:
        return write_shard(job)
    except Exception as error:
        if isinstance(error, OSError) and _is_full(error):
            raise
        return error


def died(job: ShardJob, cause: str) -> Exception:
    cases = _few([ref.id for ref in job.refs])
    return RuntimeError(f"a worker process died ({cause}) while it wrote {cases}")


def failure(failed: Sequence[tuple[ShardJob, Exception]]) -> Exception:
    """One error for all of them: a user's, if each is."""
    if len(failed) == 1:
        return failed[0][1]
    explained = [explain(error) for _, error in failed]
    lines = [
        f"{len(failed)} shards could not be written; all others are, and are kept for the next run."
    ]
    for (job, error), explanation in zip(failed, explained, strict=True):
        lines.append(
            f"{_few([ref.id for ref in job.refs])}: "
            f"{explanation[0] if explanation else str(error) or type(error).__name__}"
        )
    text = "\n".join(lines)
    users = all(explanation and explanation[1] == 2 for explanation in explained)
    return InputError(text) if users else RuntimeError(text)


def weight_of(job: ShardJob) -> int:
    """Bytes of memory that making a shard takes."""
    return memory_for(job.values) + 2 * job.stored_bytes


def _tidy(partial: Path, records: Sequence[dict]) -> None:
    """Remove shards that no valid record speaks for."""
    recorded = {Path(path).parts[1] for files in records for path in files}
    for path in (partial / "shards").glob("*"):
        if path.name not in recorded:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _members(surveyed: Survey) -> list[Member]:
    ignored = surveyed.dataset.ignore_label
    return [
        Member(
            id=case.id,
            group=case.group or case.id,
            foreground=case.foreground(ignored),
            stratum=ref.stratum,
        )
        for case, ref in zip(surveyed.facts, surveyed.refs, strict=True)
    ]


def _check_place(out: Path, raw: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"out: {out} exists and is neither an empty folder nor a store. Choose another --out."
        )
    if out.resolve() == raw.resolve() or out.resolve() in raw.resolve().parents:
        raise InputError(f"out: {out} is the raw data's own folder. Choose another --out.")


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
