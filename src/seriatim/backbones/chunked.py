"""Attention inside of chunks, a gated state from chunk to chunk (ARFlow: Hui et al. 2025, arXiv 2501.16085).

Slots of a chunk (a picture, a block) see each other by softmax attention; what earlier chunks held reaches them, in the
same heads and with the same queries, keys and values, through a matrix of linear attention that does not grow:

    out = softmax(q k^T) v + (q exp(sum of g up to here)) S,        S <- exp(mean of g) S + k^T v   after each chunk

with k divided by the root of the head's dimension, and g = log sigmoid(W (h + c)) / 16 of each slot and head, where c
is the vector that drives the norms. Queries, keys and values have unit root mean square over all heads together, the
output has it within each head, and a gate on it. The sum of g runs over the slots of a chunk in their order, as in the
released code, though attention inside has none.

Chunks may go on from one another in a tree (`scan.chunks_of`): blocks in two streams are trained in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.cache import Keep
from seriatim.backbones.driven import Driven, Vector
from seriatim.backbones.layer import MATRICES, Layer, TransformerConfig, Weights
from seriatim.backbones.norm import rms_norm
from seriatim.backbones.state import StateCache, States
from seriatim.backbones.transformer import Context, Transformer
from seriatim.initial import drawn
from seriatim.plan import OrderError, Plan
from seriatim.scan import CHAIN, Chunks


@dataclass(frozen=True)
class ChunkedConfig(TransformerConfig):
    """A transformer's, driven by a vector as wide as it is; rotary angles, norms of queries and keys, and heads that
    share keys are not known here. slowness: by what logarithms of gates are divided."""

    slowness: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vector != self.width:
            raise ValueError(f"gates read slots plus what drives them: a vector {self.width} wide, got {self.vector}")
        if self.rope or self.qk_norm or self.softcap or self.relative or self.groups != self.heads:
            raise ValueError("queries, keys and values of chunks have norms and heads of their own, and no angles")
        if len(set(self.kinds)) > 1 or self.memory is not None:
            raise ValueError("all layers hand on the same chunks, and read no memory")


class ChunkedLayer(Layer):
    """The parameters of one layer: a transformer's, a gate on what is mixed, and one on what is remembered."""

    matrices = (*MATRICES, "gate")

    def __init__(self, c: ChunkedConfig):
        super().__init__(c)
        self.gate = nn.Parameter(drawn(c.heads * c.dim, c.width))
        self.forget = nn.Parameter(drawn(c.heads, c.width))


class Sight(NamedTuple):
    """Which chunks there are, and the states before them, layer by layer (None: nothing was there)."""

    chunks: Chunks
    cache: ChunkCache | None


class Chunked(Transformer):
    """Layers over slots that stand in chunks. `mixers` says so: other views are refused."""

    config: ChunkedConfig

    def __init__(self, config: ChunkedConfig):
        super().__init__(config)
        for i in range(config.depth):
            self.layers[i] = ChunkedLayer(config)
        self.mixers = dict.fromkeys(config.kinds, "chunks")
        self.skippable = frozenset({"feedforward"})  # a state takes in every slot

    def new_cache(self, batch: int, capacity: int = 256) -> ChunkCache:  # type: ignore[override]
        """The states of `batch` rows, as large after a thousand chunks as after one."""
        c = self.config
        return ChunkCache(
            c.depth, batch, (0, 0), (c.heads, c.dim, c.dim), self.format, next(self.parameters()).device, c.kinds[0]
        )

    def compile_decoding(self) -> None:
        """Nothing: a step of a recurrence is left as it is."""

    def _sights(self, plan: Plan, cache: Any, x: Tensor, some: bool) -> dict[str, Any]:
        if plan.layers is not None or plan.spawns:
            raise OrderError("a state takes in every slot in every layer, but this plan has slots that skip layers")
        kind = self.config.kinds[0]
        return {kind: Sight(plan.chunks(kind) if cache is None else cache.chunks, cache)}

    def _attend(self, i: int, w: Weights, h: Tensor, sight: Any, context: Context) -> Float[Tensor, "b s hd"]:
        c = self.config
        b, n, _ = h.shape
        parts = context.product(h, w["qkv"], w["qkv_bias"]).chunk(3, -1)
        q, k, v = (rms_norm(x, None, c.eps).view(b, n, c.heads, c.dim) for x in parts)
        forget = F.linear(h, w["forget"]) + _at_slots(context.condition, w["forget"])
        log = F.logsigmoid(forget) / c.slowness
        before = None if sight.cache is None else sight.cache.states[i][1]
        with torch.autocast(h.device.type, enabled=False):  # states are as exact as can be
            exact = torch.promote_types(h.dtype, torch.float32)
            q, k, v, log = (x.to(exact) for x in (q, k * c.dim**-0.5, v, log))
            out, after = mixed(q, k, v, log, sight.chunks, before)
            out = rms_norm(out, None, c.eps).flatten(2).to(h.dtype)
        if sight.cache is not None:
            sight.cache.leave((sight.cache.states[i][0], torch.stack(after)), None)
        return F.silu(context.product(h, w["gate"])) * out


def mixed(
    q: Float[Tensor, "b s h p"],
    k: Float[Tensor, "b s h p"],
    v: Float[Tensor, "b s h p"],
    log: Float[Tensor, "b s h"],
    chunks: Chunks,
    before: Float[Tensor, "b h p p"] | None = None,
) -> tuple[Float[Tensor, "b s h p"], list[Float[Tensor, "b h p p"]]]:
    """What slots take from their own chunk and from the states that it goes on from; and the state after each chunk.

    log: of the gates, not positive; before: the state that came before this forward (None: zeros).
    """
    b, _, heads, p = q.shape
    slots = chunks.slots.to(q.device)
    live = None if chunks.even else slots >= 0
    where = slots.clamp(min=0)
    q, k, v = (x[:, where].transpose(2, 3) for x in (q, k, v))  # b z h m p
    log = log[:, where].transpose(2, 3)  # b z h m
    seen, mean = None, log.mean(-1)
    if live is not None:
        log, seen = log * live[:, None], live[:, None, None].expand(b, -1, -1, -1, -1).flatten(0, 1)
        mean = log.sum(-1) / live.sum(1)[:, None]
    inside = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), seen, scale=1.0)
    out = inside.unflatten(0, (b, -1))
    keys = k if live is None else k * live[:, None, :, None]
    wrote, through = keys.mT @ v, mean.exp()[..., None, None]
    into = q * log.cumsum(-1).exp()[..., None]
    start = q.new_zeros(b, heads, p, p) if before is None else before.to(q.dtype)
    after: list[Tensor] = []
    entering: list[Tensor] = []
    for z, parent in enumerate(chunks.parent):
        entering.append(start if parent < 0 else after[parent])
        after.append(torch.addcmul(wrote[:, z], entering[z], through[:, z]))
    out = out + into @ torch.stack(entering, 1)
    return out.transpose(2, 3).flatten(1, 2)[:, chunks.place.to(q.device)], after


def _at_slots(vector: Vector | None, weight: Float[Tensor, "h d"]) -> Float[Tensor, "b s h"] | Float[Tensor, "b 1 h"]:
    """What a driving vector adds at each slot, through a matrix; nothing where norms are plain."""
    assert vector is not None
    if not isinstance(vector, Driven):
        return F.linear(vector if vector.dim() == 3 else vector[:, None], weight)
    said = F.linear(vector.vector, weight)
    if vector.plain is not None:
        said = said.masked_fill(vector.plain[..., None], 0)
    return said[:, vector.group]


class ChunkCache(StateCache):
    """The state of each layer after the chunks that a row has taken in. Kept is a path of whole chunks of what is
    pending, or nothing; a forward that goes on from here sees all that was taken in."""

    skips = False  # a state takes in every slot
    chunks: Chunks  # of the pending forward

    def kept(self, name: str, source: Tensor) -> None:
        """Nothing is remembered of conditions."""

    def keep(self, name: str, source: Tensor, value: Any) -> Any:
        """Returns what it is given, and forgets it."""
        return value

    def begin(self, plan: Plan) -> None:
        self.chunks = plan.chunks(self.kind)
        self._check_seen(plan, CHAIN)
        self._after = []

    def commit(self, keep: Keep, plan: Plan) -> None:
        """Raises ValueError where what is kept of a row is no path of whole chunks."""
        after, self._after = [a for a in self._after if a is not None], []
        if isinstance(keep, int):
            keep = range(keep)
        path = keep.cpu() if isinstance(keep, Tensor) else torch.tensor(list(keep), dtype=torch.long)[None]
        if not bool((path >= 0).any()):
            return
        if not after or int(path.max()) >= plan.size or path.shape[0] not in (1, self.batch):
            raise ValueError(f"slots {path.tolist()} cannot be kept of {plan.size * bool(after)} pending ones")
        last = torch.tensor([self._last([i for i in row if i >= 0]) for row in path.tolist()]).expand(self.batch)
        rows, at = torch.arange(self.batch), last.clamp(min=0)
        self._take([(conv, state[at.to(state.device), rows]) for conv, state in after], last >= 0)
        count = (torch.as_tensor(self._count) + (path >= 0).sum(1)).expand(self.batch)
        self._count = int(count[0]) if bool((count == count[0]).all()) else count
        self._note(path, plan)

    def _last(self, kept: list[int]) -> int:
        """The last chunk of a path of slots; -1 of none."""
        if not kept:
            return -1
        z = last = max(int(self.chunks.chunk[i]) for i in kept)
        whole: list[int] = []
        while z >= 0:
            whole += [i for i in self.chunks.slots[z].tolist() if i >= 0]
            z = self.chunks.parent[z]
        if sorted(whole) != sorted(kept):
            raise ValueError(
                f"slots {sorted(kept)} are no path of whole chunks; behind the last of them that would be "
                f"{sorted(whole)}. A state cannot leave slots out: use layers with keys and values"
            )
        return last

    def states_taken(self) -> list[Float[Tensor, "b h p p"]]:
        """The committed state of each layer."""
        return [state for _, state in self.states]


__all__ = ["ChunkCache", "Chunked", "ChunkedConfig", "ChunkedLayer", "States", "mixed"]
