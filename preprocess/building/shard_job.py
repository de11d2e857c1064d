"""One shard of a store in the making: which cases it holds, how it is made, and how one knows that
it is finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import file_facts, write_atomically
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.checking.check import Survey
from segfleet.preprocess.readers.base import CaseRef, RawReader
from segfleet.preprocess.stores.base import store_module
from segfleet.preprocess.stores.chunks import chunk_of
from segfleet.preprocess.stores.manifest import CaseEntry, Dataset, Plan, layout_of
from segfleet.preprocess.transforms.case_transforms import (
    along,
    check_room,
    preprocess_case,
    stored_grid,
)

STATE = ".state"  # inside OUT.partial: records of what is finished
REVISION = 5  # of the transforms: another one makes finished shards of a killed run void


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """All that a worker needs to make one shard. `key` is the hash of everything that determines
    its content."""

    reader: RawReader
    refs: tuple[CaseRef, ...]
    sources: tuple[str, ...]
    dataset: Dataset
    plan: Plan
    format: str
    codec: str
    root: Path
    shard: str
    chunk: tuple[int, int, int]
    stored_bytes: int
    values: int  # of the largest raw image, all channels
    key: str

    @property
    def record(self) -> Path:
        return self.root / STATE / "done" / f"{Path(self.shard).name}.json"


def shard_jobs(
    reader: RawReader, surveyed: Survey, plan: Plan, request: BuildRequest
) -> list[ShardJob]:
    """Cases in their order, as many in a shard as fit."""
    channels, width = len(plan.normalisation), np.dtype(plan.dtype).itemsize
    chunk = chunk_of(plan.patch, plan.median_shape, channels * width)
    bundles: list[list[int]] = []
    sizes: list[int] = []
    for index, case in enumerate(surveyed.facts):
        cropped, spacing = (along(v, plan.transpose) for v in (case.crop_shape, case.spacing))
        check_room(case.id, cropped, spacing, plan)
        shape, _ = stored_grid(cropped, spacing, plan)
        turned = plan.transpose != (0, 1, 2)
        same = not turned and shape == case.raw_shape == case.crop_shape
        truth = 0 if same else int(np.prod(case.raw_shape))
        size = int(np.prod(shape)) * (channels * width + 1) + truth
        if bundles and sizes[-1] + size <= request.shard_bytes:
            bundles[-1].append(index)
            sizes[-1] += size
        else:
            bundles.append([index])
            sizes.append(size)
    jobs = []
    for number, (bundle, size) in enumerate(zip(bundles, sizes, strict=True)):
        refs = tuple(surveyed.refs[index] for index in bundle)
        sources = tuple(surveyed.facts[index].source_sha256 for index in bundle)
        values = channels * max(int(np.prod(surveyed.facts[index].raw_shape)) for index in bundle)
        cases = [(ref.id, ref.group, source) for ref, source in zip(refs, sources, strict=True)]
        content = [
            REVISION,
            surveyed.dataset.model_dump(mode="json"),
            plan.model_dump(mode="json"),
            request.format,
            layout_of(request.format),
            chunk,
            cases,
            *(
                [] if request.codec == "blosc" else [request.codec]
            ),  # shards of old begin as they do
        ]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        jobs.append(
            ShardJob(
                reader=reader,
                refs=refs,
                sources=sources,
                dataset=surveyed.dataset,
                plan=plan,
                format=request.format,
                codec=request.codec,
                root=request.partial,
                shard=f"shards/{number:05d}",
                chunk=chunk,
                stored_bytes=size,
                values=values,
                key=key,
            )
        )
    return jobs


def write_shard(job: ShardJob) -> dict:
    """Make one shard and leave its record; its files. Nothing of it remains if that fails. Raises
    an error that names the case."""
    writer = store_module(job.format).Writer(
        job.root, job.shard, chunk=job.chunk, dtype=job.plan.dtype, codec=job.codec
    )
    try:
        entries = [_write_case(writer, job, number) for number in range(len(job.refs))]
        files = writer.publish()
    except BaseException:
        writer.abandon()
        raise
    record = {
        "key": job.key,
        "cases": [entry.model_dump(mode="json") for entry in entries],
        "files": files,
    }
    write_atomically(job.record, json.dumps(record))
    return files


def _write_case(writer, job: ShardJob, number: int) -> CaseEntry:
    ref, key = job.refs[number], f"case{number:05d}"
    try:
        case = job.reader.read(ref)
        if case.extra["source_sha256"] != job.sources[number]:
            raise InputError(
                f"case '{ref.id}': its files changed while they were preprocessed. Run the same "
                "command again."
            )
        image, label, description = preprocess_case(
            case, job.plan, ignore_label=job.dataset.ignore_label
        )
        truth = np.ascontiguousarray(case.label_ZYX, np.uint8) if description["has_truth"] else None
        sha256 = writer.write(key, image, label, truth)
    except (InputError, OSError):
        raise
    except Exception as error:
        raise RuntimeError(f"case '{ref.id}': {type(error).__name__}: {error}") from error
    return CaseEntry(
        id=ref.id,
        group=case.patient,
        shard=job.shard,
        key=key,
        sha256=sha256,
        source_sha256=case.extra["source_sha256"],
        image_file=case.extra["files"][0],
        **description,
    )


def record_of(job: ShardJob) -> dict:
    """What `write_shard` left: {"key", "cases", "files"}."""
    return json.loads(job.record.read_text(encoding="utf-8"))


def finished(job: ShardJob) -> dict | None:
    """The files of a shard that is complete and made from what is there now."""
    try:
        record = record_of(job)
        whole = all(
            (job.root / path).stat().st_size == expected["bytes"]
            and file_facts(job.root / path) == expected
            for path, expected in record["files"].items()
        )
        return record["files"] if record["key"] == job.key and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
