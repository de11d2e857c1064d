"""The compiled kernel: built once, whoever builds and whatever was left behind; the same numbers
with any number of threads."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from segfleet.models.scan import backends, build, native, selective_scan_fn

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler on PATH"
)
needs_kernel = pytest.mark.skipif(
    bool(native.unavailable(torch.device("cpu"))), reason="the compiled kernel is not available"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("SEGFLEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture
def source(tmp_path):
    """A library that compiles in no time."""
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not chosen a back end yet."""
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.delenv("SEGFLEET_SCAN", raising=False)
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def example(batch=2, channels=4, length=6144, state=16):
    draw = torch.Generator().manual_seed(3)
    row, matrix = (batch, channels, length), (batch, 1, state, length)
    tensors = [
        torch.randn(s, generator=draw)
        for s in (row, row, (channels, state), matrix, matrix, (channels,), row, (channels,))
    ]
    tensors[2] = -tensors[2].exp()
    return [x.requires_grad_() for x in tensors]


@needs_kernel
@pytest.mark.parametrize("length", [6144, 300])  # by chunks of time; by blocks of channels too
def test_results_do_not_depend_on_the_number_of_threads(length, monkeypatch):
    monkeypatch.setattr(native, "PER_THREAD", 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            tensors = example(length=length)
            out, last = selective_scan_fn(*tensors, True, True, backend="native")
            results.append([out, last, *torch.autograd.grad(out.sin().sum() + last.sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_kernel
def test_forward_and_backward_make_no_tensor_of_length_times_state():
    """Peak memory above what the process held with inputs, output and gradients: a fraction of the
    inputs. In a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of the running process is read from Linux's /proc")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    extra, inputs = map(int, done.stdout.split())
    assert extra < 0.25 * inputs, (
        f"{extra / 2**20:.1f} MiB beyond {inputs / 2**20:.1f} MiB of inputs"
    )


def measure_peak() -> tuple[int, int]:
    """Bytes beyond inputs, output and gradients; bytes of the inputs."""
    torch.set_num_threads(1)
    small = example(length=64)
    # loads what is loaded once
    torch.autograd.grad(selective_scan_fn(*small, True, backend="native").sum(), small)
    tensors = example(batch=4, channels=4, length=65536)
    # gradients, output and its gradient: touched, then given back
    held = [torch.ones_like(x) for x in (*tensors, tensors[0], tensors[0])]

    def kilobytes(field):
        return int(
            next(
                x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
            ).split()[1]
        )

    base = kilobytes("VmRSS:")
    del held
    Path("/proc/self/clear_refs").write_text("5")
    out = selective_scan_fn(*tensors, True, backend="native")
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    return (kilobytes("VmHWM:") - base) * 1024, sum(x.nbytes for x in tensors)


@needs_kernel
@pytest.mark.parametrize("bits", range(0, 1 << 16, 1 << 12))
def test_every_half_number_survives_the_way_in_and_out(bits):
    """out = D u with D = 1 and B = 0: u comes back bit for bit, subnormals, infinities and all."""
    codes = torch.arange(bits, bits + (1 << 12), dtype=torch.int32).to(torch.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        u = codes.view(dtype).view(1, 1, -1)
        zero, one = torch.zeros(1, 1, dtype=torch.float32), torch.ones(1)
        out = selective_scan_fn(u, torch.zeros_like(u), zero, zero, zero, one, backend="native")
        expected = (
            torch.where(u.float().abs() < torch.finfo(torch.float32).tiny, 0, u)
            if dtype == torch.bfloat16
            else u
        )
        finite = u.isfinite()  # 0 x infinity is NaN in the state already
        assert torch.equal(out[finite], expected[finite])


@needs_compiler
def test_builds_without_openmp_and_without_the_machines_own_instructions(cache, monkeypatch, fresh):
    monkeypatch.setattr(build, "FLAGS", ((),))
    small = example(length=200)
    expected = selective_scan_fn(*small, True, backend="chunked")
    torch.testing.assert_close(
        selective_scan_fn(*small, True, backend="native"), expected, rtol=1e-5, atol=1e-5
    )
    assert len(list(cache.iterdir())) == 1


def test_without_a_compiler_it_says_so_once_and_goes_on(cache, monkeypatch, fresh, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    small = example(length=20)
    with caplog.at_level(logging.WARNING, logger="segfleet.scan"):
        out = [selective_scan_fn(*small, True) for _ in range(2)]
    assert torch.equal(out[0], selective_scan_fn(*small, True, backend="chunked"))
    assert [r.getMessage() for r in caplog.records] == [
        "selective scan on cpu runs with back end 'chunked' (native: no C++ compiler on PATH "
        "(looked for c++, g++, clang++))"
    ]


@needs_compiler
def test_a_compiler_that_fails_is_not_fatal(cache, tmp_path, source, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: disk on fire' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(
        build.BuildError, match="cannot compile answer.cpp: fatal error: disk on fire"
    ):
        build.load(source)
    assert not list(cache.iterdir())


@needs_compiler
def test_a_second_load_does_not_compile(cache, source, monkeypatch):
    assert build.load(source).answer() == 42
    # a compute node needs no compiler once a login node of its kind has built
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build.load(source).answer() == 42


@needs_compiler
@pytest.mark.parametrize(
    "damage", [b"", b"not a library", None], ids=["emptied", "overwritten", "cut short"]
)
def test_a_damaged_library_is_built_again(cache, source, damage):
    build.load(source)
    (library,) = cache.iterdir()
    good = library.read_bytes()
    library.unlink()
    library.write_bytes(good[: len(good) // 2] if damage is None else damage)
    assert build.load(source).answer() == 42
    (library,) = cache.iterdir()
    assert library.read_bytes() == good


@needs_compiler
def test_changed_source_is_another_library(cache, source):
    assert build.load(source).answer() == 42
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert build.load(source).answer() == 43
    assert len(list(cache.iterdir())) == 2


BUILD_ALONE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print(build.load(pathlib.Path(sys.argv[2])).answer(), flush=True)
"""


def start(source, **more):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD_ALONE, build.__file__, str(source)],
        stdout=subprocess.PIPE,
        text=True,
        **more,
    )


@needs_compiler
def test_a_killed_build_leaves_nothing_that_hurts(cache, source, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    # writes part of its output and hangs
    slow.write_text('#!/bin/sh\necho half > "$(eval echo \\${$#})"\nexec sleep 60\n')
    slow.chmod(0o755)
    builder = start(source, env={**os.environ, "CXX": str(slow)}, start_new_session=True)
    until = time.monotonic() + 20
    while not any(x.stat().st_size for x in cache.glob(".build-*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait()
    (left,) = cache.glob(".build-*")
    assert build.load(source).answer() == 42
    os.utime(left, (0, 0))
    assert build.load(source).answer() == 42
    assert not list(cache.glob(".build-*"))


@needs_compiler
def test_ranks_that_build_at_the_same_time_all_succeed(cache, source):
    builders = [start(source) for _ in range(6)]
    assert [b.communicate(timeout=60)[0].strip() for b in builders] == ["42"] * 6
    assert build.load(source).answer() == 42
    assert not list(cache.glob(".build-*"))


@needs_compiler
def test_a_folder_that_cannot_be_written_is_passed_over(source, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file where a folder should be")
    monkeypatch.delenv("SEGFLEET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert isinstance(build.load(source), ctypes.CDLL)
    assert list((tmp_path / f"segfleet-{os.getuid()}" / "native").glob("answer-*.so"))


if __name__ == "__main__":
    print(*measure_peak())
