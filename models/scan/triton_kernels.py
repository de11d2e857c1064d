"""Triton kernels of the selective scan. Nothing of size length x state is stored; no atomics, so
results do not vary from run to run.

Every chunk of time is its own program, forward and backward, so a long sequence with few channels
still fills the machine:
  chunk_sums       what each chunk adds to a state that enters as zero, or asks of the state before
                   it, and its total step
  carry            from these the true states between chunks (forward) or adjoints (backward): the
                   only walk through time
  outputs          y, skip and gate of a chunk, or the gradient of the gate
  gradients        all other gradients of a chunk, channels of a block one after the other
Tiles are (T, N): T = one chunk, N = a block of states. Steps past the end have step size 0, which
leaves a state as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _compose(a1, b1, a2, b2):
    """h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _softplus(x, TERMS: tl.constexpr):
    """log(1 + exp x); log1p by 2 atanh(e / (2 + e)), which keeps its digits where log(1 + e) does
    not."""
    e = tl.exp(-tl.abs(x))
    s = e / (e + 2.0)
    p = s * 0.0 + 1.0 / (2 * TERMS - 1)
    for i in tl.static_range(TERMS - 1):
        p = p * s * s + 1.0 / (2 * (TERMS - 2 - i) + 1)
    return tl.where(x > 20.0, x, tl.where(x > 0.0, x, 0.0) + 2.0 * s * p)


@triton.jit
def _row(ptr, sb, sd, st, b, d, t, mask, DT: tl.constexpr):
    """x[b, d, t] for a vector t."""
    return tl.load(ptr + b * sb + d * sd + t * st, mask=mask, other=0.0).to(DT)


@triton.jit
def _steps(
    ptr,
    sb,
    sd,
    st,
    b,
    d,
    t,
    mask,
    bias,
    SOFTPLUS: tl.constexpr,
    TERMS: tl.constexpr,
    DT: tl.constexpr,
):
    """Raw and true step sizes, true ones 0 where masked."""
    raw = _row(ptr, sb, sd, st, b, d, t, mask, DT) + bias
    step = raw
    if SOFTPLUS:
        step = _softplus(raw, TERMS)
    return raw, tl.where(mask, step, 0.0)


@triton.jit
def _matrix(
    ptr, sb, sg, sn, st, b, g, d, t, n, mask_t, mask_n, N, CONST: tl.constexpr, DT: tl.constexpr
):
    """Tile (T, N) of B or C; constant: (1, N)."""
    if CONST:
        return tl.load(ptr + d * N + n, mask=mask_n, other=0.0).to(DT)[None, :]
    else:
        return tl.load(
            ptr + b * sb + g * sg + t[:, None] * st + n[None, :] * sn,
            mask=mask_t[:, None] & mask_n[None, :],
            other=0.0,
        ).to(DT)


@triton.jit
def _gated(g, z, GATED: tl.constexpr):
    """Gradient of y from that of the output."""
    if GATED:
        g = g * z / (1.0 + tl.exp(-z))
    return g


@triton.jit
def chunk_sums(
    delta, dsb, dsd, dst, x, xsb, xsd, xst, z, zsb, zsd, zst, M, msb, msg, msn, mst, A, bias, sums,
    totals,
    channels, per_group, length, chunks, N,
    REVERSE: tl.constexpr, GATED: tl.constexpr, CONST: tl.constexpr, SOFTPLUS: tl.constexpr,
    TERMS: tl.constexpr,
    DT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Forward: x = u, M = B. Reverse: x = gradient of the output, M = C. sums (B, D, K, N), totals
    (B, D, K)."""
    pid = tl.program_id(0).to(tl.int64)
    k, bd = pid % chunks, pid // chunks
    b, d = bd // channels, bd % channels
    g = d // per_group
    t = k * BT + tl.arange(0, BT)
    mask = t < length
    shift = tl.load(bias + d).to(DT)
    raw, step = _steps(delta, dsb, dsd, dst, b, d, t, mask, shift, SOFTPLUS, TERMS, DT)
    value = _row(x, xsb, xsd, xst, b, d, t, mask, DT)
    if REVERSE:  # a_0 ... a_t, this step's included
        span = tl.cumsum(step, 0)
        if GATED:
            value = _gated(value, _row(z, zsb, zsd, zst, b, d, t, mask, DT), True)
    else:  # the steps after this one
        later = (t + 1 < length) & (tl.arange(0, BT) + 1 < BT)
        raw, after = _steps(delta, dsb, dsd, dst, b, d, t + 1, later, shift, SOFTPLUS, TERMS, DT)
        span = tl.cumsum(after, 0, reverse=True)
        value = value * step
    tl.store(totals + pid, tl.sum(step, 0))
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        mask_n = n < N
        rate = tl.load(A + d * N + n, mask=mask_n, other=0.0)
        m = _matrix(M, msb, msg, msn, mst, b, g, d, t, n, mask, mask_n, N, CONST, DT)
        part = tl.exp(span[:, None] * rate[None, :]) * m * value[:, None]
        tl.store(sums + pid * N + n, tl.sum(tl.where(mask[:, None], part, 0.0), 0), mask=mask_n)


@triton.jit
def carry(
    sums,
    totals,
    A,
    first,
    channels,
    chunks,
    N,
    REVERSE: tl.constexpr,
    DT: tl.constexpr,
    BN: tl.constexpr,
):
    """In place. Forward: the state after each chunk. Reverse: the adjoint that enters each chunk
    from behind; `first` is the last one's."""
    bd = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = n < N
    rate = tl.load(A + (bd % channels) * N + n, mask=mask, other=0.0)
    now = tl.zeros((BN,), DT)
    if REVERSE:
        now = tl.load(first + bd * N + n, mask=mask, other=0.0).to(DT)
    for i in range(chunks):
        k = bd * chunks + i
        if REVERSE:
            k = bd * chunks + chunks - 1 - i
        added = tl.load(sums + k * N + n, mask=mask, other=0.0)
        if REVERSE:
            tl.store(sums + k * N + n, now, mask=mask)
        now = tl.exp(tl.load(totals + k) * rate) * now + added
        if not REVERSE:
            tl.store(sums + k * N + n, now, mask=mask)


@triton.jit
def outputs(
    u, usb, usd, ust, delta, dsb, dsd, dst, z, zsb, zsd, zst, grad, gsb, gsd, gst,
    B, bsb, bsg, bsn, bst, C, csb, csg, csn, cst, A, D, bias, ends, out,
    channels, per_group, length, chunks, N,
    SKIP: tl.constexpr, GATED: tl.constexpr, GRAD: tl.constexpr, CONST_B: tl.constexpr,
    CONST_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, DT: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out (B, D, L) contiguous; with GRAD the gradient of z instead."""
    pid = tl.program_id(0).to(tl.int64)
    k, bd = pid % chunks, pid // chunks
    b, d = bd // channels, bd % channels
    g = d // per_group
    i = tl.arange(0, BT)
    t = k * BT + i
    mask = t < length
    raw, step = _steps(
        delta, dsb, dsd, dst, b, d, t, mask, tl.load(bias + d).to(DT), SOFTPLUS, TERMS, DT
    )
    x = _row(u, usb, usd, ust, b, d, t, mask, DT)
    y = tl.zeros((BT,), DT)
    if SKIP:
        y = x * tl.load(D + d).to(DT)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        mask_n = n < N
        rate = tl.load(A + d * N + n, mask=mask_n, other=0.0)
        # 0 before the first chunk
        start = tl.load(ends + (pid - 1) * N + n, mask=mask_n & (k * N + n >= N), other=0.0)
        a = tl.exp(step[:, None] * rate[None, :])
        added = (step * x)[:, None] * _matrix(
            B, bsb, bsg, bsn, bst, b, g, d, t, n, mask, mask_n, N, CONST_B, DT
        )
        added = tl.where((i == 0)[:, None], added + a * start[None, :], added)
        a, h = tl.associative_scan((a, added), 0, _compose)
        y += tl.sum(
            h * _matrix(C, csb, csg, csn, cst, b, g, d, t, n, mask, mask_n, N, CONST_C, DT), 1
        )
    if GATED:
        gate = _row(z, zsb, zsd, zst, b, d, t, mask, DT)
        s = 1.0 / (1.0 + tl.exp(-gate))
        if GRAD:
            y = _row(grad, gsb, gsd, gst, b, d, t, mask, DT) * y * s * (1.0 + gate * (1.0 - s))
        else:
            y = y * gate * s
    tl.store(out + bd * length + t, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gradients(
    u, usb, usd, ust, delta, dsb, dsd, dst, z, zsb, zsd, zst, grad, gsb, gsd, gst,
    B, bsb, bsg, bsn, bst, C, csb, csg, csn, cst, A, D, bias, ends, flow,
    du, ddelta, dB, dC, part_B, part_C, part_D, part_bias,
    batch, groups, per_group, length, chunks, N, blocks,
    SKIP: tl.constexpr, GATED: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, DT: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """A chunk, a block of channels, a block of states. du, ddelta (N blocks, B, D, L); dB, dC
    (blocks, B, G, N, L); flow becomes the chunk's part of the gradient of A (B, D, K, N), part_B
    and part_C likewise if constant; part_D, part_bias (N blocks, B, D, K)."""
    pid = tl.program_id(0).to(tl.int64)
    block, piece = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k, bg = pid % chunks, pid // chunks
    b, g = bg // groups, bg % groups
    i = tl.arange(0, BT)
    t = k * BT + i
    mask = t < length
    before = (t - 1 < length) & (i > 0)
    after = (t + 1 < length) & (i + 1 < BT)
    n = piece * BN + tl.arange(0, BN)
    mask_n = n < N
    tile = mask[:, None] & mask_n[None, :]
    sum_B = tl.zeros((BT, BN), DT)
    sum_C = tl.zeros((BT, BN), DT)
    for d in range(
        g * per_group + block * per_group // blocks,
        g * per_group + (block + 1) * per_group // blocks,
    ):
        bd = b * groups * per_group + d
        at = (bd * chunks + k) * N + n
        shift = tl.load(bias + d).to(DT)
        rate = tl.load(A + d * N + n, mask=mask_n, other=0.0)
        raw, step = _steps(delta, dsb, dsd, dst, b, d, t, mask, shift, SOFTPLUS, TERMS, DT)
        x = _row(u, usb, usd, ust, b, d, t, mask, DT)
        out = _row(grad, gsb, gsd, gst, b, d, t, mask, DT)
        if GATED:
            out = _gated(out, _row(z, zsb, zsd, zst, b, d, t, mask, DT), True)
        m = _matrix(B, bsb, bsg, bsn, bst, b, g, d, t, n, mask, mask_n, N, CONST_B, DT)
        c = _matrix(C, csb, csg, csn, cst, b, g, d, t, n, mask, mask_n, N, CONST_C, DT)
        a = tl.exp(step[:, None] * rate[None, :])
        # the state before each step, by a scan of the elements one step earlier: exact also where h
        # - delta B u would cancel
        unused, step_p = _steps(
            delta, dsb, dsd, dst, b, d, t - 1, before, shift, SOFTPLUS, TERMS, DT
        )
        x_p = _row(u, usb, usd, ust, b, d, t - 1, before, DT)
        m_p = _matrix(B, bsb, bsg, bsn, bst, b, g, d, t - 1, n, before, mask_n, N, CONST_B, DT)
        # 0 before the first chunk
        start = tl.load(ends + at - N, mask=mask_n & (k * N + n >= N), other=0.0)
        added = (step_p * x_p)[:, None] * m_p
        added = tl.where((i == 0)[:, None], start[None, :] + added * 0.0, added)
        unused2, h_p = tl.associative_scan(
            (tl.exp(step_p[:, None] * rate[None, :]), added), 0, _compose
        )
        q = a * h_p
        h = q + (step * x)[:, None] * m
        # lambda, backwards; element t carries the decay of step t + 1
        unused, step_n = _steps(
            delta, dsb, dsd, dst, b, d, t + 1, after, shift, SOFTPLUS, TERMS, DT
        )
        behind = tl.load(flow + at, mask=mask_n, other=0.0)
        asked = c * out[:, None]
        asked = tl.where((i == BT - 1)[:, None], asked + behind[None, :], asked)
        unused2, lam = tl.associative_scan(
            (tl.exp(step_n[:, None] * rate[None, :]), asked), 0, _compose, reverse=True
        )
        lam = tl.where(tile, lam, 0.0)
        grad_C = tl.where(tile, h, 0.0) * out[:, None]
        grad_B = lam * (step * x)[:, None]
        if CONST_C:
            tl.store(part_C + at, tl.sum(grad_C, 0), mask=mask_n)
        else:
            sum_C += grad_C
        if CONST_B:
            tl.store(part_B + at, tl.sum(grad_B, 0), mask=mask_n)
        else:
            sum_B += grad_B
        q = q * lam
        tl.store(flow + at, tl.sum(q * step[:, None], 0), mask=mask_n)
        through_b = tl.sum(lam * m, 1)
        d_step = tl.sum(q * rate[None, :], 1) + x * through_b
        if SOFTPLUS:
            d_step = tl.where(raw > 20.0, d_step, d_step / (1.0 + tl.exp(-raw)))
        d_u = step * through_b
        line = piece * batch * groups * per_group + bd
        if SKIP:
            if piece == 0:
                d_u += out * tl.load(D + d).to(DT)
            tl.store(part_D + line * chunks + k, tl.sum(out * x, 0))
        tl.store(part_bias + line * chunks + k, tl.sum(tl.where(mask, d_step, 0.0), 0))
        tl.store(du + line * length + t, d_u.to(du.dtype.element_ty), mask=mask)
        tl.store(ddelta + line * length + t, d_step.to(ddelta.dtype.element_ty), mask=mask)
    place = ((block * batch * groups + bg) * N + n[None, :]) * length + t[:, None]
    if not CONST_B:
        tl.store(dB + place, sum_B.to(dB.dtype.element_ty), mask=tile)
    if not CONST_C:
        tl.store(dC + place, sum_C.to(dC.dtype.element_ty), mask=tile)
