"""One position of every row: its keys and values into the ring cache, and attention over what the ring holds."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton has no types of its own: what a kernel is given, it types at the first launch.

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.engine.contract import EngineFault

_KIND = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""How the kernels tell what a ring holds; 0 is a float of the model's dtype."""
_WARPS = 4
_DEPTH = 2
_STAGES = 4
_LOAD_BYTES = 16
_MOST_SPLITS = 32
_PROGRAMS_A_PROCESSOR = 32
"""Some rounds of what a multiprocessor of an H100 runs at once, so that the last round, in which some have nothing left
to do, is short against the rest. Reckoned, not measured."""


def append(qkv: Tensor, cos: Tensor, sin: Tensor, values: Tensor, scales: Tensor | None, slot: Tensor) -> Tensor:
    """Turn queries and keys by their position, and keep keys and values.

    Args:
        qkv: [W, 3, H, head_dim], each row contiguous.
        cos, sin: float32 [W, head_dim / 2], contiguous; pairs of neighbouring channels turn together.
        values: [W, 2, H, P, head_dim], a layer of a ring: in the model's dtype, int8 or float8_e4m3fn.
        scales: float32 [W, 2, H, P], the same layer's; None where values are not quantised.
        slot: int64 [W], where to.

    Returns:
        The queries [W, H, head_dim] in the dtype of `qkv`.

    Raises:
        EngineFault: a ring that is laid out otherwise, or in a dtype that the GPU cannot read.
    """
    rows, _, heads, width = qkv.shape
    row_slots, head_slots = _layout(values, scales)
    q = qkv.new_empty(rows, heads, width)
    _append[heads, rows](
        qkv, cos, sin, _raw(values), scales, slot, q, qkv.stride(0), row_slots, head_slots,
        DIM=width, KIND=_KIND.get(values.dtype, 0), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return q


def attend(q: Tensor, values: Tensor, scales: Tensor | None, held: Tensor, splits: int | None = None) -> Tensor:
    """Attention of one query a row and head over the first slots of its ring, in whatever order they are.

    Args:
        q: [W, H, head_dim], contiguous.
        values, scales: as for `append`.
        held: int64 [W], how many slots a row holds; nothing is read of a row that holds none, and it gets zeros.
        splits: into how many parts, 32 at most, each row's slots are shared out; None leaves it to the GPU's size.

    Returns:
        [W, H * head_dim] in the dtype of `q`.

    Raises:
        EngineFault: as `append`.
    """
    rows, heads, width = q.shape
    row_slots, head_slots = _layout(values, scales)
    splits = splits or _splits(rows * heads, _processors(q.device))
    out, parts, weights = q.new_empty(rows, heads * width), None, None
    if splits > 1:
        parts = q.new_empty(rows, heads, splits, width, dtype=torch.float32)
        weights = q.new_empty(rows, heads, splits, dtype=torch.float32)
    _attend[heads, rows, splits](
        q, _raw(values), scales, held, out if parts is None else parts, weights,
        math.log2(math.e) / math.sqrt(width), row_slots, head_slots,
        LANES=_lanes(width, values.element_size()), DEPTH=_DEPTH, STAGES=_STAGES, DIM=width,
        KIND=_KIND.get(values.dtype, 0), WHOLE=parts is None, num_warps=_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    if parts is not None:
        _join[heads, rows](
            parts, weights, out, splits, MOST=_MOST_SPLITS, DIM=width, num_warps=_WARPS, enable_fp_fusion=True
        )
    return out


def _layout(values: Tensor, scales: Tensor | None) -> tuple[int, int]:
    """How many slots lie between two rows and between two heads of a layer: in its values and its scales alike."""
    heads, width = values.shape[2], values.shape[4]
    row, part, head, slot = (stride // width for stride in values.stride()[:4])
    if width & (width - 1) or values.stride()[3:] != (width, 1) or part != heads * head:
        found = f"{width} channels a head, strides {values.stride()}"
        raise EngineFault(f"ring: {found}; a power of two and slots side by side, heads too, are right")
    if scales is not None and scales.stride() != (row, part, head, slot):
        raise EngineFault(f"ring: strides of scales {scales.stride()}; the values' {(row, part, head, slot)} are right")
    if values.dtype is torch.float8_e4m3fn:
        _require_float8(values.device)
    return row, head


@cache
def _require_float8(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise EngineFault(f"kv fp8: {name} has no float8 (compute capability below 8.9); int8 is right")


def _raw(values: Tensor) -> Tensor:
    """A quantised ring as bytes, which the kernels convert themselves."""
    return values.view(torch.uint8) if values.dtype in _KIND else values


def _lanes(width: int, element_bytes: int) -> int:
    """How many slots a program reads with one copy of 16 bytes a thread."""
    return max(1, _WARPS * 32 * _LOAD_BYTES // (width * element_bytes))


def _splits(programs: int, processors: int) -> int:
    return max(1, min(_MOST_SPLITS, -(-processors * _PROGRAMS_A_PROCESSOR // programs)))


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. One in the interpreter, which has none to keep busy."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _append(
    qkv, cos, sin, values, scales, slot, q, qkv_row, row_slots, head_slots, DIM: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    head, heads = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, DIM)
    pair = row * (DIM // 2) + channel // 2
    c, s = tl.load(cos + pair), tl.load(sin + pair)
    s = tl.where(channel % 2 == 0, -s, s)
    source = qkv + row * qkv_row + head * DIM
    turned = _turned(source, channel, c, s)
    tl.store(q + (row * heads + head) * DIM + channel, turned.to(q.dtype.element_ty))
    # A ring of many rows is more than 2^31 elements: places in it are int64.
    place = row * row_slots + head.to(tl.int64) * head_slots + tl.load(slot + row)
    k = _turned(source + heads * DIM, channel, c, s)
    _keep(k, values, scales, place, channel, DIM, KIND)
    v = tl.load(source + 2 * heads * DIM + channel).to(tl.float32)
    _keep(v, values, scales, place + heads.to(tl.int64) * head_slots, channel, DIM, KIND)


@triton.jit
def _turned(source, channel, c, s):
    x, partner = tl.load(source + channel), tl.load(source + (channel ^ 1))
    return x.to(tl.float32) * c + partner.to(tl.float32) * s


@triton.jit
def _keep(x, values, scales, place, channel, DIM: tl.constexpr, KIND: tl.constexpr):
    at = values + place * DIM + channel
    if KIND == 0:
        tl.store(at, x.to(values.dtype.element_ty))
    else:
        largest = 127.0 if KIND == 1 else 448.0
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), largest), 1e-8)
        tl.store(scales + place, scale)
        # Rounding may have left the largest a hair above.
        whole = tl.minimum(tl.maximum(tl.div_rn(x, scale), -largest), largest)
        if KIND == 1:
            tl.store(at, tl.floor(whole + 0.5).to(tl.int8).to(tl.uint8, bitcast=True))
        else:
            tl.store(at, _e4m3(whole))


@triton.jit
def _e4m3(x):
    """The byte of a float32 of at most 448, rounded to even: Triton's own conversion differs in the interpreter.

    Bits of a float32, shortened to 3 of mantissa and moved from a bias of 127 to one of 7. Below 2^-6 an e4m3 counts in
    steps of 2^-9, which a float32 of 2^14 does too.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + (((7 - 127) << 23) + 0x7FFFF) + ((size >> 20) & 1)) >> 20
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return (((bits >> 24) & 0x80) | tl.where(size < (121 << 23), small, normal)).to(tl.uint8)


# A step reads all that the rings hold and does little with it, so the reading must never wait. An H100 has to have some
# 20 kB on their way to each multiprocessor at any time (3.35 TB/s over 132 of them, and a latency taken to be 0.8 us).
# Left to itself the compiler loads just before use. In a loop of 4 stages three tiles of keys and values are always
# being copied into shared memory, 16 bytes a thread and copy: 24 kB a program, of which, by their registers, 5 to 9 run
# on a multiprocessor at once, so that much more than enough is under way while others compute.
#
# For the same reason threads seldom wait for each other. Slots are dealt to lanes of threads, each lane with a softmax
# of its own over every LANES-th slot; a lane is the few threads of one warp that share a head's channels. They are put
# together once, at the end.
@triton.jit
def _attend(
    q, values, scales, held, out, weights, factor, row_slots, head_slots,
    LANES: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    split, splits = tl.program_id(2), tl.num_programs(2)
    channel = tl.arange(0, DIM)
    into = (row * heads + head) * splits + split
    TILE: tl.constexpr = LANES * DEPTH
    end = tl.load(held + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(end, TILE), splits) * TILE
    start = split * share
    end = tl.minimum(start + share, end)
    if not WHOLE and start >= end:
        tl.store(weights + into, -float("inf"))
        return

    query = tl.load(q + (row * heads + head) * DIM + channel).to(tl.float32) * factor
    excess = 0.0
    if KIND == 1:
        query *= 256.0
        excess = 1.5 * tl.sum(query, 0)
    place = row * row_slots + head.to(tl.int64) * head_slots
    keys, key_scales = values + place * DIM, scales
    part = heads.to(tl.int64) * head_slots
    if KIND != 0:
        key_scales += place
    highest = tl.full([LANES], -1e30, tl.float32)
    mass, scaled = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES, DIM], tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        slot = first + tl.arange(0, TILE)
        real = tl.reshape(slot < end, [DEPTH, LANES])
        # Past the end the last slot is read again, rather than one that may hold anything.
        slot = tl.minimum(slot, end - 1)
        element = slot[:, None] * DIM + channel[None, :]
        # A thread holds the same channels of DEPTH slots: the shape that sums over them without asking another thread.
        k = tl.reshape(tl.load(keys + element), [DEPTH, LANES, DIM])
        v = tl.reshape(tl.load(keys + part * DIM + element), [DEPTH, LANES, DIM])
        score = tl.sum(_number(k, KIND) * query[None, None, :], 2) - excess
        if KIND != 0:
            score *= tl.reshape(tl.load(key_scales + slot), [DEPTH, LANES])
        score = tl.where(real, score, -float("inf"))
        before = highest
        highest = tl.maximum(before, tl.max(score, 0))
        shrink = tl.exp2(before - highest)
        weight = tl.exp2(score - highest[None, :])
        mass = mass * shrink + tl.sum(weight, 0)
        if KIND != 0:
            weight *= tl.reshape(tl.load(key_scales + part + slot), [DEPTH, LANES])
        if KIND == 1:
            scaled = scaled * shrink + tl.sum(weight, 0)
        mean = mean * shrink[:, None] + tl.sum(weight[:, :, None] * _number(v, KIND), 0)

    if KIND == 1:
        mean = (mean - 1.5 * scaled[:, None]) * 256.0
    joined, weight = _together(mean, mass, highest)
    tl.store(out + into * DIM + channel, joined.to(out.dtype.element_ty))
    if not WHOLE:
        tl.store(weights + into, weight)


@triton.jit
def _together(mean, mass, highest):
    """The lanes' softmaxes as one: its mean, and the binary logarithm of its mass, by which splits are joined."""
    top = tl.max(highest, 0)
    shrink = tl.exp2(highest - top)
    # At least one where a slot was read: the highest score's own.
    whole = tl.maximum(tl.sum(mass * shrink, 0), 1.0)
    return tl.sum(mean * shrink[:, None], 0) / whole, top + tl.log2(whole)


@triton.jit
def _number(stored, KIND: tl.constexpr):
    """A stored number in float32; an int8 x as 1.5 + x / 256.

    That is put together from bits, in two instructions and exactly: Hopper converts integers at a small part of the
    rate at which it multiplies (triton-lang/triton pull request 4563), which would hold up the reading. What is too
    much is taken off the sums.
    """
    if KIND == 1:
        bits = stored.to(tl.int8, bitcast=True).to(tl.int32) * 32768 + 0x3FC00000
        return bits.to(tl.float32, bitcast=True)
    elif KIND == 2:
        return stored.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return stored.to(tl.float32)


@triton.jit
def _join(parts, weights, out, splits, MOST: tl.constexpr, DIM: tl.constexpr):
    """The splits' softmaxes as one; `weights` are the binary logarithms of their masses, -inf of an empty one's."""
    into = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    split, channel = into * splits + tl.arange(0, MOST), tl.arange(0, DIM)
    weight = tl.load(weights + split, mask=tl.arange(0, MOST) < splits, other=-float("inf"))
    real = weight > -float("inf")
    share = tl.exp2(weight - tl.maximum(tl.max(weight, 0), -1e30))
    mean = tl.load(parts + split[:, None] * DIM + channel[None, :], mask=real[:, None], other=0.0)
    # At least one where a split has any: the heaviest's own.
    joined = tl.sum(mean * share[:, None], 0) / tl.maximum(tl.sum(share, 0), 1.0)
    tl.store(out + into * DIM + channel, joined.to(out.dtype.element_ty))
