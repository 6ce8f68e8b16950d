"""The fast path's Triton kernels: matrix times vector, rotary positions into the cache, attention over its pages.

Rows are tokens. A row has a slot (a conversation's place) and a position in it; position -1 marks a row that fills up a
batch: it is neither read nor written. Keys and values of a layer are [pages, key-value heads, PAGE, head size] each,
and `table` [slots, pages of a slot] says in which page a slot's positions are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def _gemv(x, norm, weight, bias, residual, out, n, eps, K: tl.constexpr, K2: tl.constexpr, NORM: tl.constexpr,
          GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, N: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * N + tl.arange(0, N)
    inside = rows < n
    if NORM:
        every = tl.arange(0, K2)
        whole = tl.load(x + every, every < K, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole) / K + eps)
    total = tl.zeros([N, BLOCK], tl.float32)
    gate = tl.zeros([N, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        known = columns < K
        value = tl.load(x + columns, known, 0.0)
        if NORM:
            scaled = (value.to(tl.float32) * scale).to(value.dtype).to(tl.float32)
            value = (scaled * tl.load(norm + columns, known, 0.0).to(tl.float32)).to(value.dtype)
        at = weight + rows.to(tl.int64)[:, None] * K + columns[None, :]
        mask = inside[:, None] & known[None, :]
        if GATED:
            gate += tl.load(at, mask, 0.0).to(tl.float32) * value.to(tl.float32)[None, :]
            at += n.to(tl.int64) * K
        total += tl.load(at, mask, 0.0).to(tl.float32) * value.to(tl.float32)[None, :]
    result = tl.sum(total, 1)
    kind = out.dtype.element_ty
    if BIAS:
        result += tl.load(bias + rows, inside, 0.0).to(tl.float32)
    result = result.to(kind).to(tl.float32)
    if GATED:
        gated = tl.sum(gate, 1).to(kind).to(tl.float32)
        result = (gated / (1 + tl.exp(-gated))).to(kind).to(tl.float32) * result
    if RESIDUAL:
        result += tl.load(residual + rows, inside, 0.0).to(tl.float32)
    tl.store(out + rows, result.to(kind), inside)


def gemv(x, weight, bias=None, *, norm=None, eps=0.0, gated=False, residual=None):
    """`weight` [n, k] times the one row of `x` [1, k], read once at the memory's speed; [1, n].

    `norm`: x goes through that RMSNorm first. `gated`: weight holds gate over up, and silu(gate x) * up x [1, n / 2] is
    returned. `residual` [1, n] is added.
    """
    n, k = weight.shape
    n //= 1 + gated
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    rows, columns, warps = (4, 2048, 8) if k <= 8192 else (8, 512, 4)  # the fastest of ten on an H100
    _gemv[(triton.cdiv(n, rows),)](
        x, norm, weight, bias, residual, out, n, eps, K=k, K2=triton.next_power_of_2(k), NORM=norm is not None,
        GATED=gated, BIAS=bias is not None, RESIDUAL=residual is not None, N=rows, BLOCK=columns, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def _place(qkv, cos, sin, keys, values, table, slots, positions, width, QUERIES: tl.constexpr, HEADS: tl.constexpr,
           D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    if position >= 0:
        half = tl.arange(0, HALF)
        at = qkv + (row.to(tl.int64) * (QUERIES + 2 * HEADS) + head) * D
        first, second = tl.load(at + half), tl.load(at + D // 2 + half)
        kind = first.dtype
        if head < QUERIES + HEADS:
            c = tl.load(cos + position * HALF + half).to(tl.float32)
            s = tl.load(sin + position * HALF + half).to(tl.float32)
            a, b = first.to(tl.float32), second.to(tl.float32)
            first, second = (a * c - b * s).to(kind), (b * c + a * s).to(kind)
        if head < QUERIES:
            tl.store(at + half, first)
            tl.store(at + D // 2 + half, second)
        else:
            page = tl.load(table + tl.load(slots + row) * width + position // PAGE).to(tl.int64)
            key = head < QUERIES + HEADS
            own = (head - QUERIES) % HEADS
            into = ((page * HEADS + own) * PAGE + position % PAGE) * D
            if key:
                tl.store(keys + into + half, first)
                tl.store(keys + into + D // 2 + half, second)
            else:
                tl.store(values + into + half, first)
                tl.store(values + into + D // 2 + half, second)


def place(qkv, cos, sin, keys, values, table, slots, positions, queries: int):
    """Turns queries (in place) and keys by their positions; keys and values go into the cache."""
    heads, size = keys.shape[1], keys.shape[3]
    _place[(len(qkv), queries + 2 * heads)](
        qkv, cos, sin, keys, values, table, slots, positions, table.shape[1], QUERIES=queries, HEADS=heads, D=size,
        HALF=size // 2, PAGE=keys.shape[2], num_warps=1,
    )  # fmt: skip


@triton.jit
def _attend(qkv, keys, values, table, slots, positions, out, weights, count, width, scale, QUERIES: tl.constexpr,
            HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
            M: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """One program: ROWS rows of one slot, the queries that share a key-value head, one of SPLITS parts of the pages."""
    head, split = tl.program_id(1), tl.program_id(2)
    member = tl.arange(0, M)
    row = tl.program_id(0) * ROWS + member // GROUP
    query = head * (QUERIES // HEADS) + member % GROUP
    real = (member // GROUP < ROWS) & (member % GROUP < QUERIES // HEADS) & (row < count)
    position = tl.load(positions + row, real, -1)
    slot = tl.load(slots + tl.program_id(0) * ROWS)
    length = tl.max(position) + 1
    d = tl.arange(0, D)
    n = tl.arange(0, PAGE)
    at = row.to(tl.int64)[:, None] * ((QUERIES + 2 * HEADS) * D) + query[:, None] * D + d[None, :]
    q = tl.load(qkv + at, real[:, None], 0.0)
    pages = tl.cdiv(length, PAGE)
    each = tl.cdiv(pages, SPLITS)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, D], tl.float32)
    for i in range(split * each, tl.minimum(pages, (split + 1) * each)):
        page = tl.load(table + slot * width + i).to(tl.int64)
        cell = ((page * HEADS + head) * PAGE + n)[:, None] * D + d[None, :]
        index = i * PAGE + n
        seen = index[None, :] <= position[:, None]
        k = tl.load(keys + cell)
        score = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        high = tl.maximum(top, tl.max(score, 1))
        base = tl.where(high == -float("inf"), 0.0, high)
        share = tl.exp2(score - base[:, None])
        keep = tl.exp2(top - base)
        v = tl.load(values + cell, index[:, None] < length, 0.0)
        total = total * keep + tl.sum(share, 1)
        mixed = mixed * keep[:, None] + tl.dot(share.to(v.dtype), v)
        top = high
    mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
    spot = (row.to(tl.int64) * QUERIES + query) * SPLITS + split
    tl.store(out + spot[:, None] * D + d[None, :], mixed.to(out.dtype.element_ty), real[:, None])
    if SPLITS > 1:
        tl.store(weights + spot, top + tl.log2(total), real)


@triton.jit
def _combine(parts, weights, out, D: tl.constexpr, SPLITS: tl.constexpr):
    """The parts of one row's one head, each with the logarithm of its weight, become one."""
    head = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, D)
    weight = tl.load(weights + head * SPLITS + split)
    top = tl.max(weight)
    weight = tl.exp2(weight - tl.where(top == -float("inf"), 0.0, top))
    part = tl.load(parts + (head * SPLITS + split)[:, None] * D + d[None, :])
    total = tl.sum(weight)
    mixed = tl.sum(part * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + head * D + d, mixed.to(out.dtype.element_ty))


def attend(qkv, keys, values, table, slots, positions, queries: int, rows: int):
    """Attention of each row's queries to its slot's positions up to its own; [rows, queries * head size].

    `rows`: how many rows in a run belong to one slot; 1 when each has its own.
    """
    count, heads, size = len(qkv), keys.shape[1], keys.shape[3]
    group = triton.next_power_of_2(queries // heads)
    blocks = triton.cdiv(count, rows)
    # Few conversations: each one's pages are read by several programs, so that all of the GPU reads.
    splits = 1 if rows > 1 else max(1, min(16, triton.next_power_of_2(256 // (blocks * heads))))
    out = torch.empty(count, queries * size, dtype=qkv.dtype, device=qkv.device)
    parts, weights = out, out
    if splits > 1:
        parts = torch.empty(count, queries, splits, size, dtype=torch.float32, device=qkv.device)
        weights = torch.empty(count, queries, splits, dtype=torch.float32, device=qkv.device)
    _attend[(blocks, heads, splits)](
        qkv, keys, values, table, slots, positions, parts, weights, count, table.shape[1], size**-0.5 * LOG2_E,
        QUERIES=queries, HEADS=heads, D=size, PAGE=keys.shape[2], ROWS=rows, GROUP=group, M=max(16, rows * group),
        SPLITS=splits, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _combine[(count * queries,)](parts, weights, out, D=size, SPLITS=splits, num_warps=1)
    return out
