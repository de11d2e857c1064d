"""The compiled reading of boxes gives the bits of the plain one, and sees the same damage."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest

from segfleet.pipeline.data import unpack
from segfleet.preprocess.stores.base import store_module
from segfleet.preprocess.stores.packed import DamagedShard

SHAPE = (21, 40, 33)


def shard(folder, fmt: str, dtype: str, channels: int, chunk=(8, 16, 16), codec="blosc"):
    """A shard of two cases, one with empty chunks, and what was written."""
    draw = np.random.default_rng(0)
    written = {}
    writer = store_module(fmt).Writer(folder, "data/all", chunk=chunk, dtype=dtype, codec=codec)
    for key in ("a", "b"):
        image = (100 * draw.standard_normal((channels, *SHAPE))).astype(dtype)
        image[:, 8:16, 16:32, :16] = 0
        label = np.zeros(SHAPE, np.uint8)
        label[3:9, 20:30, 5:20] = draw.integers(1, 4, (6, 10, 15))
        writer.write(key, image, label, None)
        written[key] = {"image": image, "label": label}
    writer.publish()
    module = store_module(fmt)
    path = folder / f"data/all{module.SUFFIX}"
    return (module.Shard(path, {}) if fmt == "zarr" else module.Shard(path)), written


@pytest.fixture(autouse=True)
def compiled():
    if unpack.library() is None:
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("fmt", ["zarr", "hdf5"])
@pytest.mark.parametrize("dtype", ["float16", "uint8", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("codec", ["blosc", "zstd"])
def test_same_bits(tmp_path, fmt, dtype, channels, codec):
    opened, written = shard(tmp_path, fmt, dtype, channels, codec=codec)
    assert opened.packed("a", "image")[0].codec == codec  # not through another library
    draw = np.random.default_rng(1)
    scale = 0.37 if dtype in ("uint8", "int16") else 1.0
    for turn in range(20):
        low = [int(draw.integers(n)) for n in SHAPE]
        size = [int(draw.integers(1, n - a + 1)) for a, n in zip(low, SHAPE, strict=True)]
        box = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
        key = "ab"[turn % 2]
        for name, kind in (("image", np.float32), ("image", dtype), ("label", np.uint8)):
            array, first = opened.packed(key, name)
            wide = np.full([*array.lead, *(n + 4 for n in size)], 7, kind)
            out = wide[..., 1:-3, 2:-2, 3:-1]  # a part of a larger array
            unpack.unpack(array, (first + low[0], *low[1:]), tuple(size), out, scale)
            expected = written[key][name][(..., *box)]
            if name == "image" and kind == np.float32:  # the stored type is left as it is
                expected = expected.astype(np.float32)
                expected = expected * np.float32(scale) if scale != 1 else expected
            assert np.array_equal(out.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))
            out[...] = 7
            assert (wide == 7).all()  # nothing else was touched
            array.fill((first + low[0], *low[1:]), size, out, scale)
            assert np.array_equal(out, expected)


@pytest.mark.parametrize("fmt", ["zarr", "hdf5"])
@pytest.mark.parametrize("shift", [-1, 0, 20, 10**6])
@pytest.mark.parametrize("codec", ["blosc", "zstd"])
def test_damage_is_named(tmp_path, fmt, shift, codec):
    """A bit anywhere in a chunk, and a file that ends early."""
    opened, _ = shard(tmp_path, fmt, "float16", 1, codec=codec)
    array, _ = opened.packed("a", "image")
    offset, count = (int(n) for n in array.index[1, 0, 1])
    path = next(p for p in tmp_path.rglob("*") if p.name in ("c.0.0.0.0", "all.h5"))
    raw = bytearray(path.read_bytes())
    if shift == 10**6:
        raw = raw[: offset + count // 2]
    else:
        raw[offset + (shift if shift >= 0 else count - 1)] ^= 4
    path.write_bytes(raw)
    out = np.empty((1, 4, 4, 4), np.float32)
    with pytest.raises(DamagedShard, match=r"chunk \(1, 0, 1\)"):
        unpack.unpack(array, (array.chunk[0], 0, array.chunk[2]), (4, 4, 4), out, 1.0)
    if shift != 10**6:
        unpack.unpack(array, (0, 0, 0), (4, 4, 4), out, 1.0)  # others are whole


def test_some_slices_of_a_chunk_of_many_blocks(tmp_path):
    """Chunks of several blocks are decoded in part."""
    opened, written = shard(tmp_path, "zarr", "float32", 2, chunk=(21, 40, 33))
    array, first = opened.packed("b", "image")
    out = np.empty((2, 3, 40, 33), np.float32)
    unpack.unpack(array, (first + 9, 0, 0), (3, 40, 33), out, 1.0)
    assert np.array_equal(out, written["b"]["image"][:, 9:12])


def test_checksum():
    made, *_ = unpack.library()
    draw = np.random.default_rng(0)
    for n in (0, 1, 7, 8, 100, 3071, 3072, 3073, 50_000):
        data = draw.integers(0, 256, n, np.uint8)
        assert made.segfleet_crc32c(data.ctypes.data, n) == google_crc32c.value(data.tobytes())
