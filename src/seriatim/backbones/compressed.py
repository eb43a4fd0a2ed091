"""Keys and values, remembered in a few bits each (GEAR, Kang et al. 2024, arXiv 2403.05527).

A matrix X of a head (tokens x channels) is kept as D + L + S. S holds the largest and smallest numbers of each vector
as they are; D the rest in `bits` bits between the bounds of a group, groups of keys running along the tokens of a
channel, those of values along the channels of a token (KIVI, Liu et al. 2024, arXiv 2402.02750); L is what is nearest
of low rank to the error of D.

The latest tokens stay exact until there are `buffer` of them (the streaming buffer); then they become one block, with
bounds, factors and exceptions of its own. A block depends on its own tokens only, so the text may come token by token
or in large parts. A prefill is blocks like everything else: the paper compresses it as one, at twice the rank, which
takes the same room.

What is traded: every forward decodes each block once a layer, into keys and values that live as long as the layer
attends. So memory is the blocks, the buffer, and one layer in full precision (half of it twice, while it is decoded);
what is saved is paid in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from seriatim.backbones.cache import Entry, Keep, KVCache
from seriatim.plan import OrderError, Plan
from seriatim.slots import below_own
from seriatim.view import View, join

Along = Literal[-2, -1]  # the axis of a quantised vector: over tokens, or over channels
KEYS, VALUES = -2, -1
ROUNDS = 3  # of the power iteration
HALF = torch.finfo(torch.float16).max


class Block(NamedTuple):
    """Matrices (*, n, d) as D + L + S, for groups of g along the n tokens (or the d channels: exchange the two).

    bounds: lowest and highest number of each group; left @ right.T is L; values stand at these places of each vector.
    """

    codes: UInt8[Tensor, "*rest bytes"]
    bounds: Float[Tensor, "*rest n/g 1 d 2"]
    left: Float[Tensor, "*rest n r"]
    right: Float[Tensor, "*rest d r"]
    values: Float[Tensor, "*rest k d"]
    places: Int[Tensor, "*rest k d"]


PARTS = len(Block._fields)


@dataclass(frozen=True)
class Codec:
    """How keys and values are compressed.

    bits: of each number, 1 to 16; group: numbers that share bounds (None: all of a vector); outliers: share of numbers
    kept as they are, half of them the largest of a vector and half the smallest, at least one of each (0: none); rank:
    of the correction of what rounding lost, for each head and block (0: none); buffer: tokens of a block, which stay
    exact until there are so many. Bounds, factors and outliers take 16 bits each. Neutral: a buffer as long as the
    text.
    """

    bits: int = 4
    group: int | None = None
    outliers: float = 0.02
    rank: int = 2
    buffer: int = 64

    def __post_init__(self) -> None:
        least = {"bits": 1, "rank": 0, "buffer": 1} | ({} if self.group is None else {"group": 1})
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} is a whole number from {low} on, got {value!r}")
        if self.bits > 16:
            raise ValueError(f"numbers are kept in 1 to 16 bits, got {self.bits}")
        if not isinstance(self.outliers, int | float) or not 0 <= self.outliers < 1:
            raise ValueError(f"outliers are a share from 0 to below 1, got {self.outliers!r}")

    def over(self, cache: KVCache, capacity: int) -> CompressedCache:
        """An empty cache whose latest entries are in `cache`, with room for `capacity` tokens in blocks. Raises
        ValueError where vectors do not divide into groups, or would be nothing but outliers."""
        channels = cache.buffer.shape[5]
        for what, size in (("the buffer", self.buffer), ("a head", channels)):
            if self.group is not None and size % self.group:
                raise ValueError(f"{what} has {size} numbers, which do not divide into groups of {self.group}")
            if 2 * self.extremes(size) >= size and self.outliers:
                raise ValueError(
                    f"{what} has {size} numbers: with a share of {self.outliers} they would all be outliers"
                )
        return CompressedCache(self, cache, capacity)

    def extremes(self, size: int) -> int:
        """How many of the largest numbers of a vector are kept as they are, and how many of the smallest."""
        return max(1, round(self.outliers * size / 2)) if self.outliers else 0

    def encode(self, x: Float[Tensor, "*rest n d"], along: int) -> Block:
        """Compress matrices whose quantised vectors run along tokens (-2: keys) or channels (-1: values)."""
        size = x.shape[along]
        places = extremes(x, self.extremes(size), along)
        rest = x.scatter(along, places, 0.0)
        middle = rest.sum(along, keepdim=True) / (size - places.shape[along])
        rest.scatter_(along, places, middle.expand(places.shape))
        groups = rest.unflatten(along, (-1, self.group or size))
        bounds = torch.stack([_half(groups.amin(along, keepdim=True)), _half(groups.amax(along, keepdim=True))], -1)
        low, step = self._scale(bounds, x.dtype)
        codes = ((groups - low) / step.where(step > 0, 1)).round_().clamp_(0, 2**self.bits - 1)
        packed = pack(codes.flatten(-3), self.bits)
        lost = rest - codes.mul_(step).add_(low).flatten(along - 1, along)
        left, right = power_iteration(lost, self.rank)
        narrow = torch.uint8 if size <= 2**8 else torch.int16 if size < 2**15 else torch.int32
        values = _half(x.gather(along, places))
        return Block(packed, bounds, _half(left), _half(right), values, places.to(narrow))

    def decode(self, block: Block, along: int, dtype: torch.dtype) -> Float[Tensor, "*rest n d"]:
        """The matrices that blocks stand for."""
        n, d = block.left.shape[-2], block.right.shape[-2]
        low, step = self._scale(block.bounds, dtype)
        groups = unpack(block.codes, self.bits, n * d, dtype).unflatten(-1, (n, d))
        groups = groups.unflatten(along, (-1, self.group or (n, d)[along]))
        x = groups.mul_(step).add_(low).flatten(along - 1, along)
        if self.rank:
            x.flatten(0, -3).baddbmm_(block.left.to(dtype).flatten(0, -3), block.right.to(dtype).flatten(0, -3).mT)
        if self.outliers:
            x.scatter_(along, block.places.long(), block.values.to(dtype))
        return x

    def _scale(self, bounds: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What code 0 of each group stands for, and how far codes are apart."""
        low, high = bounds.to(dtype).unbind(-1)
        return low, (high - low) / (2**self.bits - 1)


def extremes(x: Float[Tensor, "*rest n d"], count: int, along: int) -> Int[Tensor, "*rest k d"]:
    """Where the `count` largest numbers of each vector stand, and the smallest. (Rounds of maxima: sorting takes four
    times as long.)"""
    left, places = x.clone(), [x.narrow(along, 0, 0).long()]
    for pick, gone in ((torch.argmax, -torch.inf), (torch.argmin, torch.inf)):
        left.scatter_(along, torch.cat(places, along), gone)
        for _ in range(count):
            places.append(pick(left, along, keepdim=True))
            left.scatter_(along, places[-1], gone)
    return torch.cat(places, along)


def power_iteration(
    x: Float[Tensor, "*rest n d"], rank: int
) -> tuple[Float[Tensor, "*rest n r"], Float[Tensor, "*rest d r"]]:
    """Left and right factors of what is nearly nearest to x of this rank: A = X B and B = X' A in turns, made
    orthonormal in the last (GEAR, algorithm 2, after PowerSGD, Vogels et al. 2019, arXiv 1905.13727). Matrices that
    have no such rank get columns of zeros, so that all take the same room."""
    most = min(rank, *x.shape[-2:])
    right = _start(x.shape[-1], most).to(x)
    for _ in range(ROUNDS - 1):
        right = x.mT @ (x @ right)
    left = torch.linalg.qr(x @ torch.linalg.qr(right).Q).Q
    return F.pad(left, (0, rank - most)), F.pad(x.mT @ left, (0, rank - most))


@lru_cache(maxsize=64)
def _start(size: int, rank: int) -> Float[Tensor, "size rank"]:
    """Where power iteration starts: always the same, so that a block depends on its numbers alone."""
    with torch.inference_mode(False):
        return torch.randn(size, rank, generator=torch.Generator().manual_seed(0))


def _half(x: Tensor) -> Tensor:
    """In 16 bits, finite."""
    return x.clamp(-HALF, HALF).half()


# ---- packing ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _fields(bits: int) -> tuple[tuple[int, int], ...]:
    """(first bit, width) of the parts that a number of so many bits is packed in: widths that divide a byte."""
    out, first = [], 0
    while first < bits:
        width = min(8, 2 ** ((bits - first).bit_length() - 1))
        out.append((first, width))
        first += width
    return tuple(out)


def pack(codes: Tensor, bits: int) -> UInt8[Tensor, "*rest bytes"]:
    """Whole numbers from 0 to 2^bits - 1, (*, n), in bytes. A byte holds numbers that are far apart, so that each bit
    place is a stretch of neighbours."""
    codes, parts = codes.int(), []
    for first, width in _fields(bits):
        each = 8 // width
        part = F.pad(codes >> first & 2**width - 1, (0, -codes.shape[-1] % each)).unflatten(-1, (each, -1))
        parts.append((part << _shifts(width, part.device)).sum(-2).to(torch.uint8))
    return torch.cat(parts, -1)


def unpack(packed: UInt8[Tensor, "*rest bytes"], bits: int, count: int, dtype: torch.dtype) -> Float[Tensor, "*rest n"]:
    """The first `count` numbers that were packed, as floating point."""
    out, start = None, 0
    for first, width in _fields(bits):
        size = -(-count * width // 8)
        part = packed[..., start : start + size]
        start += size
        if width < 8:
            stretches = part[..., None, :] >> _shifts(width, part.device).to(torch.uint8)
            part = (stretches & 2**width - 1).flatten(-2)[..., :count]
        out = part.to(dtype) if out is None else out.add_(part.to(dtype), alpha=2**first)
    assert out is not None
    return out


@lru_cache(maxsize=16)
def _shifts(width: int, device: torch.device) -> Int[Tensor, "each 1"]:
    with torch.inference_mode(False):
        return torch.arange(0, 8, width, device=device, dtype=torch.int32)[:, None]


# ---- the cache -------------------------------------------------------------------------------------------------------


class CompressedCache:
    """Blocks of compressed keys and values, and behind them a `KVCache` of the latest ones, which are exact.

    Columns are those of the blocks, as many as the longest row has, then those of the latest entries; what a row lacks
    of the former carries lane -1. Serves orders along a line, where blocks need no labels but their places.
    """

    can = frozenset({"subset"})
    skips = False

    def __init__(self, codec: Codec, latest: KVCache, capacity: int):
        """`capacity`: tokens to make room for; more are taken in."""
        self.codec, self.latest = codec, latest
        self.blocks = torch.zeros(latest.batch, dtype=torch.long)  # of each row
        self.behind = 0  # columns of blocks
        self._kept: tuple[Tensor, ...] = ()  # parts of keys, then of values: (layers, batch, heads, blocks, ...) each
        self._most = max(1, capacity // codec.buffer)  # blocks a row that there is room for, once there are any
        self._spare = latest.buffer.shape[4]  # columns of the buffer between long forwards

    @property
    def length(self) -> int | Tensor:
        latest = self.latest.length
        if self.latest.plain:
            return self.behind + latest
        held = self.blocks * self.codec.buffer + latest
        return int(held[0]) if bool((held == held[0]).all()) else held

    @property
    def room(self) -> int | Tensor:
        """Slots that each row can commit together before a block is full: while it has room for them, all slots of a
        forward see the past as if they were computed one by one."""
        return self.codec.buffer - self.latest.length

    @property
    def columns(self) -> int:
        return self.behind + self.latest.columns

    @property
    def plain(self) -> bool:
        return self.latest.plain

    @property
    def batch(self) -> int:
        return self.latest.batch

    @property
    def device(self) -> torch.device:
        return self.latest.device

    @property
    def dtype(self) -> torch.dtype:
        return self.latest.dtype

    def kept(self, name: str, source: Tensor) -> Any:
        return self.latest.kept(name, source)

    def keep(self, name: str, source: Tensor, value: Any) -> Any:
        return self.latest.keep(name, source, value)

    # ---- a forward ---------------------------------------------------------------------------------------------------

    def begin(self, plan: Plan) -> None:
        if plan.layers is not None:
            raise OrderError("slots that skip layers leave holes in blocks; use the exact cache with such a plan")
        self.latest.begin(plan)

    def reach(self, slots: int) -> None:
        """As `KVCache.reach`."""
        self.latest.reach(slots)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`. Blocks are decoded here, for this layer alone, and keys before values."""
        k, v = self.latest.append(layer, k, v)
        return _beside(self._decoded(layer, 0), k), _beside(self._decoded(layer, 1), v)

    def entry(self, layer: int) -> BothEntries:
        return BothEntries(self._decoded(layer, 0), self._decoded(layer, 1), self.latest.entry(layer))

    def _decoded(self, layer: int, which: int) -> Float[Tensor, "b h c d"] | None:
        """Keys (0) or values (1) of all blocks in a layer, if there are any."""
        if not self.behind:
            return None
        at, n = self.latest.at[layer], self.behind // self.codec.buffer
        parts = self._kept[which * PARTS : (which + 1) * PARTS]
        block = Block(*(x[at, :, :, :n] for x in parts))
        return self.codec.decode(block, (KEYS, VALUES)[which], self.dtype).flatten(2, 3)

    def labels(self, view: str) -> View | None:
        latest = self.latest.labels(view)
        if latest is None or not self.behind:
            return latest
        places = self.latest.places(view, 0, self.behind)
        there = places.at < (self.blocks * self.codec.buffer)[:, None]
        return join([replace(places, lane=torch.where(there, 0, -1)), latest])

    # ---- committing --------------------------------------------------------------------------------------------------

    def commit(self, keep: Keep, plan: Plan) -> None:
        """Keep pending slots, exact as they are; a row that has a whole block now compresses it."""
        self.latest.commit(keep, plan)
        if self.latest.columns >= self.codec.buffer:
            self._compress()

    def _compress(self) -> None:
        size = self.codec.buffer
        count = torch.as_tensor(self.latest.length).expand(self.batch) // size
        most = int(count.max())
        row, turn = (torch.arange(most) < count[:, None]).nonzero(as_tuple=True)
        place = self.blocks[row] + turn
        row, turn, place = (x.to(self.device) for x in (row, turn, place))
        exact = self.latest.buffer[..., : most * size, :].unflatten(4, (most, size))
        for at, entries in enumerate(exact):  # one layer at a time: what is made on the way takes little room
            keys, values = entries[:, row, :, turn].unbind(1)  # (blocks, heads, tokens, channels)
            parts = (*self.codec.encode(keys, KEYS), *self.codec.encode(values, VALUES))
            if at == 0:
                self._reserve(int(place.max()) + 1, parts)
            for into, x in zip(self._kept, parts, strict=True):
                into[at, row, :, place] = x
        self.blocks = self.blocks + count
        self.behind = int(self.blocks.max()) * size
        self.latest.shed(most * size if self.latest.plain else count * size, self._spare)

    def _reserve(self, blocks: int, like: Sequence[Tensor]) -> None:
        """Make room for so many blocks a row, whose parts are `like` (blocks, heads, ...)."""
        have = self._kept[0].shape[3] if self._kept else 0
        if blocks > have:
            self._most = max(self._most, blocks, 2 * have)
            old, self._kept = self._kept, self._blank(like, 2)
            for into, x in zip(self._kept, old, strict=False):
                into[:, :, :, :have] = x

    def _blank(self, like: Sequence[Tensor], leading: int) -> tuple[Tensor, ...]:
        """Room for all rows, in which nothing stands: what is masked is finite wherever it is read. Parts are those of
        `like` behind so many axes."""
        layers, _, batch, heads = self.latest.buffer.shape[:4]
        return tuple(x.new_zeros(layers, batch, heads, self._most, *x.shape[leading:]) for x in like)

    # ---- changing what is committed ----------------------------------------------------------------------------------

    def evict(self, retain: Int[Tensor, "b m"]) -> None:
        """Refused: raises ValueError."""
        raise ValueError(
            "what is compressed in blocks cannot be forgotten entry by entry; orders and policies that forget need the "
            "exact cache"
        )

    def hold(self, layers: Sequence[int]) -> None:
        """As `KVCache.hold`."""
        before, at = self.latest.layers, self.latest.at
        self.latest.hold(layers)
        if self._kept and self.latest.layers != before:
            old, self._kept = self._kept, self._blank(self._kept, 4)
            for layer in set(before) & set(self.latest.layers):
                for into, x in zip(self._kept, old, strict=True):
                    into[self.latest.at[layer]] = x[at[layer]]

    def select(self, rows: Int[Tensor, "b2"], new: Sequence[CompressedCache] = ()) -> None:
        if new:
            rows = below_own(rows, self.batch)
            self.join(new)
        self.latest.select(rows)
        where = rows.clamp(min=0)
        self._kept = tuple(x[:, where.to(self.device)] for x in self._kept)
        self.blocks = self.blocks[where].masked_fill(rows < 0, 0)
        self.behind = int(self.blocks.max()) * self.codec.buffer

    def join(self, others: Sequence[CompressedCache]) -> None:
        parts = [self, *others]
        kept, rows = [part._kept for part in parts], [part.batch for part in parts]
        self.latest.join([part.latest for part in others])
        self.blocks = torch.cat([part.blocks for part in parts])
        self.behind = int(self.blocks.max()) * self.codec.buffer
        self._most, start = max(part._most for part in parts), 0
        self._kept = self._blank(next(filter(None, kept), ()), 4)
        for old, batch in zip(kept, rows, strict=True):
            for into, x in zip(self._kept, old, strict=False):
                into[:, start : start + batch, :, : x.shape[3]] = x
            start += batch

    # ---- what it takes -----------------------------------------------------------------------------------------------

    def sizes(self) -> dict[str, int]:
        """Bytes of committed entries by what they hold: the parts of blocks, and "exact"."""
        out = dict.fromkeys(Block._fields, 0)
        for name, x in zip(2 * Block._fields, self._kept, strict=False):
            out[name] += x.nbytes // (self.batch * self._most) * int(self.blocks.sum())
        return out | {"exact": self.latest.nbytes()}

    def nbytes(self) -> int:
        return sum(self.sizes().values())


class BothEntries(NamedTuple):
    """Keys and values of one layer, decoded and exact: all that a compiled step knows of a cache."""

    keys: Tensor | None
    values: Tensor | None
    latest: Entry

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`."""
        k, v = self.latest.append(layer, k, v)
        return _beside(self.keys, k), _beside(self.values, v)


def _beside(behind: Tensor | None, latest: Tensor) -> Tensor:
    return latest if behind is None else torch.cat([behind, latest], 2)
