"""Small stores to test with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segfleet.preprocess.stores.base import formats, open_store, store_module
from segfleet.preprocess.stores.content import content_sha256
from segfleet.preprocess.stores.manifest import CaseEntry, Dataset, Manifest, Plan, save_manifest
from segfleet.preprocess.stores.packed import CODECS

CHUNK = (4, 8, 16)
SHAPE = (9, 21, 34)  # no multiple of the chunk


def draw_case(shape=SHAPE, dtype="float16", channels=2, seed=0):
    """Image, label and truth of a case, with a region of zeros larger than a chunk."""
    draw = np.random.default_rng(seed)
    image = (
        draw.normal(0, 1, (channels, *shape))
        if dtype.startswith("float")
        else draw.integers(0, 200, (channels, *shape))
    )
    image = image.astype(dtype)
    image[..., shape[1] // 2 :, :] = 0
    label = np.repeat(draw.integers(0, 3, (shape[0], shape[1], 1)), shape[2], axis=2).astype(
        np.uint8
    )
    label[..., : shape[1] // 2, :] = 0
    truth = draw.integers(0, 2, (shape[0] + 2, shape[1] + 3, shape[2] + 1)).astype(np.uint8)
    return image, label, truth


def publish_store(
    root: Path, fmt: str, shards: dict[str, dict], *, chunk=CHUNK, scale=1.0, codec="blosc"
):
    """A store of `shards`: shard -> case -> (image, label, truth or None)."""
    files, cases = {}, []
    first = next(iter(next(iter(shards.values())).values()))[0]
    dtype = first.dtype.name
    for shard, members in shards.items():
        writer = store_module(fmt).Writer(root, shard, chunk=chunk, dtype=dtype, codec=codec)
        for name, (image, label, truth) in members.items():
            writer.write(name, image, label, truth)
            raw = label.shape if truth is None else truth.shape
            facts = {
                "spacing": (1, 1, 1),
                "raw_spacing": (1, 1, 1),
                "crop": ((0, 1),) * 3,
                "shape": label.shape,
                "raw_shape": raw,
            }
            sha256 = content_sha256(image, label)
            cases.append(
                CaseEntry(
                    id=name,
                    group=name,
                    shard=shard,
                    key=name,
                    has_truth=truth is not None,
                    sha256=sha256,
                    **facts,
                )
            )
        files |= writer.publish()
    dataset = Dataset(
        name="drawn",
        reader="none",
        dims=3,
        channels=tuple("abc"[: len(first)]),
        labels={"background": 0, "x": 1, "y": 2},
    )
    plan = Plan(
        target_spacing=(1, 1, 1),
        patch=(8, 16, 16),
        normalisation=("none",) * len(first),
        dtype=dtype,
        scale=scale,
    )
    save_manifest(
        root,
        Manifest(
            format=fmt,
            codec=codec,
            id="drawn",
            dataset=dataset,
            plan=plan,
            cases=tuple(cases),
            files=files,
        ),
    )
    return open_store(root)


@pytest.fixture
def drawn():
    """`drawn(shape, dtype, channels, seed)`: image, label and truth of a case."""
    return draw_case


@pytest.fixture
def publish():
    """`publish(root, format, {shard: {case: (image, label, truth)}}, chunk=, scale=)`: a store,
    opened."""
    return publish_store


@pytest.fixture(params=sorted(formats()))
def fmt(request):
    return request.param


@pytest.fixture(params=sorted(CODECS))
def codec(request):
    return request.param


@pytest.fixture
def store(tmp_path, fmt, codec):
    return publish_store(
        tmp_path,
        fmt,
        {"data/case-0": {"case-0": draw_case()}, "data/case-1": {"case-1": draw_case(seed=1)}},
        codec=codec,
    )
