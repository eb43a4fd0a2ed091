"""State-space duality (Mamba-2) as plain functions: recurrence, chunked scan, draft trees, and replay of a kept path.

Per head, with a decay A < 0 and a step dt > 0, the state S (p, n) and the output are

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,        y_t = S_t C_t

(Mamba-2: "Transformers are SSMs", arXiv 2405.21060, sections 3 and 6). A path of slots therefore weighs slot v at slot
u by exp of the sum of dt A strictly after v: on a sequence that is the chunked scan, on a tree the same sum is taken
along the path (STree, arXiv 2505.14969), and a state never has to be stored per slot: the activations of pending slots
are kept, and the accepted path is replayed from the committed state.

Axes: b batch, s slots, h heads, p channels of a head, g groups of heads that share B and C (head j is in group
j // (h / g)), n state, c channels of the convolution, k its width. Decays are non-positive sums exponentiated, never a
quotient of two exponentials, and those sums are added up rather than subtracted from one another, so nothing overflows
and a strong decay costs its neighbours no digits. Half-precision inputs are computed, and states kept, in float32; y
comes back in the type of x. A = 0 is linear attention.

This file knows nothing about projections, gates, norms or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.scan import samples

# ---- the state -------------------------------------------------------------------------------------------------------


def ssd_step(
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """One slot: what it outputs and the state after it (a new tensor). A row with dt = 0 keeps its state."""
    kind = x.dtype
    x, dt, A, B, C, state = _promoted(x, dt, A, B, C, state)
    b, h, p = x.shape
    g, n = B.shape[1:]
    new = state * (dt * A).exp()[..., None, None]
    new = torch.addcmul(new.reshape(b, g, -1, n), (x * dt[..., None]).reshape(b, g, -1, 1), B[:, :, None])
    y = new @ C[..., None]
    return y.reshape(b, h, p).to(kind), new.reshape(b, h, p, n)


def ssd_recurrent(
    x: Float[Tensor, "b s h p"],
    dt: Float[Tensor, "b s h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b s g n"],
    C: Float[Tensor, "b s g n"],
    state: Float[Tensor, "b h p n"] | None = None,
    lane: Int[Tensor, "b s"] | None = None,
) -> tuple[Float[Tensor, "b s h p"], Float[Tensor, "b h p n"]]:
    """The definition, slot by slot: the reference for everything else here, and slow.

    Args:
        dt: after bias and softplus.
        A: negative, one a head.
        state: what came before; none is zero. It belongs to the first slot that is not padding.
        lane: packed samples: the state starts anew where the lane changes; slots of lane -1 are padding, which leave
            the state alone and output zeros. A lane that comes back later starts anew as well.

    Returns:
        y, and the state after the last slot.
    """
    _check(x, dt, A, B, C)
    kind = x.dtype
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if state is None else state
    x, dt, A, B, C, state = _promoted(x, dt, A, B, C, state)
    ys = []
    if lane is None:
        for t in range(x.shape[1]):
            y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
            ys.append(y)
    else:
        current = lane.new_full(lane.shape[:1], -1)
        for t in range(x.shape[1]):
            live = lane[:, t] >= 0
            changed = live & (current >= 0) & (lane[:, t] != current)
            current = torch.where(live, lane[:, t], current)
            begun = state.masked_fill(changed[:, None, None, None], 0)
            y, after = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], begun)
            ys.append(y.masked_fill(~live[:, None, None], 0))
            state = torch.where(live[:, None, None, None], after, state)
    return (torch.stack(ys, 1) if ys else x).to(kind), state


def ssd_chunked(
    x: Float[Tensor, "b s h p"],
    dt: Float[Tensor, "b s h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b s g n"],
    C: Float[Tensor, "b s g n"],
    chunk: int = 64,
    state: Float[Tensor, "b h p n"] | None = None,
    lane: Int[Tensor, "b s"] | None = None,
) -> tuple[Float[Tensor, "b s h p"], Float[Tensor, "b h p n"]]:
    """`ssd_recurrent` by blocks: attention-like products inside chunks, a recurrence from chunk to chunk.

    Any length; the cost is linear in it, and in the chunk. Arguments and results are those of `ssd_recurrent`
    (arXiv 2405.21060, section 6).
    """
    _check(x, dt, A, B, C)
    if chunk < 1:
        raise ValueError(f"a chunk holds at least one slot, got chunk={chunk}")
    kind = x.dtype
    (b, s, h, p), (g, n) = x.shape, B.shape[2:]
    state = x.new_zeros(b, h, p, n) if state is None else state
    x, dt, A, B, C, state = _promoted(x, dt, A, B, C, state)
    if s == 0:
        return x.to(kind), state
    size = min(chunk, s)
    count = -(-s // size)
    pad = count * size - s
    x, dt, B, C = (_quiet(t, lane, pad) for t in (x, dt, B, C))

    # r: heads of one group; l, m: query and key slot in a chunk; z: chunk
    log = (dt * A).reshape(b, count, size, g, -1).permute(0, 1, 3, 4, 2)  # b z g r l
    u = (x * dt[..., None]).reshape(b, count, size, g, -1, p).permute(0, 1, 3, 4, 2, 5)  # b z g r m p
    B, C = (t.reshape(b, count, size, g, n).transpose(2, 3) for t in (B, C))  # b z g l n
    # decay[m, l]: what remains at l of what m wrote; 1 where l <= m, and there the scores are zeroed instead
    decay = log[..., None, :].expand(*log.shape, size).triu(1).cumsum(-1).exp()  # b z g r m l
    score = (B @ C.mT).triu()  # b z g m l
    to_end = decay[..., -1]  # b z g r m
    from_start = log.cumsum(-1).exp()  # b z g r l
    through = from_start[..., -1]  # b z g r
    if lane is not None:
        sample = samples(F.pad(lane, (0, pad), value=-1))[0].reshape(b, count, size)
        end = sample[:, :, -1]
        before = F.pad(end[:, :-1], (1, 0))  # the incoming state is of the sample that the last chunk ended in
        score = score * (sample[:, :, :, None] == sample[:, :, None]).unsqueeze(2)
        to_end = to_end * (sample == end[..., None])[:, :, None, None]
        from_start = from_start * (sample == before[..., None])[:, :, None, None]
        through = through * (end == before)[:, :, None, None]

    inside = (score[:, :, :, None] * decay).mT @ u  # b z g r l p
    wrote = (u * to_end[..., None]).transpose(-1, -2).reshape(b, count, g, -1, size) @ B  # b z g (r p) n
    wrote = wrote.reshape(b, count, h, p, n)
    through = through.reshape(b, count, h, 1, 1)
    entering = []
    for z in range(count):
        entering.append(state)
        state = torch.addcmul(wrote[:, z], state, through[:, z])
    brought = C @ torch.stack(entering, 1).reshape(b, count, g, -1, n).mT  # b z g l (r p)
    brought = brought.reshape(b, count, g, size, -1, p).transpose(3, 4) * from_start[..., None]
    y = (inside + brought).permute(0, 1, 4, 2, 3, 5).reshape(b, count * size, h, p)
    return y[:, :s].to(kind), state


def _quiet(x: Float[Tensor, "b s *rest"], lane: Int[Tensor, "b s"] | None, pad: int) -> Float[Tensor, "b t *rest"]:
    """Zero where a slot belongs to no sample, and in `pad` slots behind: a step of zero neither decays nor writes."""
    if lane is not None:
        x = x.masked_fill((lane < 0).view(*lane.shape, *[1] * (x.dim() - 2)), 0)
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad)) if pad else x


def ssd_tree(
    x: Float[Tensor, "b s h p"],
    dt: Float[Tensor, "b s h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b s g n"],
    C: Float[Tensor, "b s g n"],
    ancestor: Bool[Tensor, "#b s s"],
    state: Float[Tensor, "b h p n"] | None = None,
) -> Float[Tensor, "b s h p"]:
    """Every slot of a draft tree in one pass: its state descends from its parent's, a root's from `state`.

    y_u = exp(c_u) S C_u + sum over v on the path to u of exp(c_u - c_v) (C_u . B_v) dt_v x_v, with c the sum of dt A
    along the path. `state` is not changed; see `ssd_replay` for the state at the end of a path. The cost is cubic in
    the size of the tree: meant for drafts, up to some hundred slots.

    Args:
        ancestor: `ancestors(parent)`, the same for all layers of a forward; one row if the batch shares the tree.
    """
    _check(x, dt, A, B, C)
    if ancestor.dtype != torch.bool:
        raise ValueError("ssd_tree takes the boolean matrix `ancestors(parent)`, once a forward, not the parents")
    kind = x.dtype
    b, s, h, p = x.shape
    g, n = B.shape[2:]
    state = x.new_zeros(b, h, p, n) if state is None else state
    x, dt, A, B, C, state = _promoted(x, dt, A, B, C, state)
    log = (dt * A).transpose(1, 2)  # b h s
    on_path = ancestor.to(x.dtype)[:, None]  # #b 1 u v
    strict = on_path.tril(-1) + on_path.triu(1)
    along = on_path * log[:, :, None]  # b h u w: what each slot of the path to u adds
    decay = (along @ strict).exp()  # b h u v: only w strictly below v; where v is no ancestor the score is zeroed
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # b g s n
    score = (C @ B.mT) * on_path  # b g u v
    u = (x * dt[..., None]).transpose(1, 2).reshape(b, g, -1, s, p)
    inside = (score[:, :, None] * decay.reshape(b, g, -1, s, s)) @ u  # b g r s p
    brought = (C @ state.reshape(b, g, -1, n).mT).reshape(b, g, s, -1, p).transpose(2, 3)
    y = torch.addcmul(inside, brought, along.sum(-1).exp().reshape(b, g, -1, s, 1))
    return y.reshape(b, h, s, p).transpose(1, 2).to(kind)


def ssd_replay(
    x: Float[Tensor, "b s h p"],
    dt: Float[Tensor, "b s h"],
    A: Float[Tensor, "h"] | Float[Tensor, "b 1 h"],
    B: Float[Tensor, "b s g n"],
    path: Int[Tensor, "#b m"],
    state: Float[Tensor, "b h p n"],
) -> Float[Tensor, "b h p n"]:
    """The state after the pending slots `path`, in that order, from the committed `state`; -1 is padding.

    One product, whatever the length; no state per slot is ever stored. An empty path returns the same numbers.
    """
    x, dt, A, B, state = _promoted(x, dt, A, B, state)
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    if path.shape[1] == 0:
        return state
    dead = path[..., None] < 0
    dt = _take(dt, path).masked_fill(dead, 0)  # a step of zero neither decays nor writes
    x, B = (_take(t, path).masked_fill(dead[..., None], 0) for t in (x, B))
    log = dt * A
    later = F.pad(log[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # b m h: sum strictly after
    u = x * (dt * later.exp())[..., None]
    wrote = u.reshape(b, -1, g, h // g * p).permute(0, 2, 3, 1) @ B.transpose(1, 2)  # b g (r p) n
    return torch.addcmul(wrote.reshape(b, h, p, n), state, log.sum(1).exp()[..., None, None])


# ---- the convolution before it ---------------------------------------------------------------------------------------


def conv_step(
    x: Float[Tensor, "b c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None,
    state: Float[Tensor, "b c k-1"],
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c k-1"]]:
    """`causal_conv` of one slot."""
    window = torch.cat([state.to(x.dtype), x[..., None]], -1)
    y = (window * weight).sum(-1)
    return y if bias is None else y + bias, window[..., 1:]


def causal_conv(
    x: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None,
    state: Float[Tensor, "b c k-1"] | None = None,
    lane: Int[Tensor, "b s"] | None = None,
) -> tuple[Float[Tensor, "b s c"], Float[Tensor, "b c k-1"]]:
    """Each channel over its last k slots; `weight[:, -1]` meets the slot itself. No activation.

    Args:
        state: the inputs of the k - 1 slots before, oldest first; none is zero.
        lane: as in `ssd_recurrent`: a window does not reach beyond its own sample, nor does it see padding.

    Returns:
        y, and the inputs that the next slot will look back on.
    """
    b, s, c = x.shape
    width = weight.shape[1]
    state = x.new_zeros(b, c, width - 1) if state is None else state
    if lane is not None:
        dead = (lane < 0)[..., None]
        taps = _lane_taps(lane, width)
        window = _window(F.pad(x.masked_fill(dead, 0), (0, 0, 0, 1)), taps, state)  # one slot more: the next
        window = window.masked_fill(taps[..., None] < 0, 0)
        return _weigh(window[:, :-1], weight, bias).masked_fill(dead, 0), window[:, -1, 1:].flip(1).mT
    full = torch.cat([state.mT.to(x.dtype), x], 1)  # b (k-1+s) c
    y = x * weight[:, -1]  # shifted products: several times faster than conv1d on few slots, about equal on many
    for j in range(width - 1):
        y = torch.addcmul(y, full[:, j : j + s], weight[:, j])
    tail = full[:, s:].mT.clone()  # a state must not hold on to the whole input
    return y if bias is None else y + bias, tail


def tree_conv(
    x: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None,
    taps: Int[Tensor, "#b s k"],
    state: Float[Tensor, "b c k-1"] | None = None,
) -> Float[Tensor, "b s c"]:
    """`causal_conv` along the paths of a draft tree, which go on from the committed `state`; `state` is not changed.

    Args:
        taps: `tree_taps(parent, k)`, the same for all layers of a forward.
    """
    if taps.shape[-1] != weight.shape[1]:
        raise ValueError(f"taps are for a width of {taps.shape[-1]}, the weight has {weight.shape[1]}")
    state = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1) if state is None else state
    return _weigh(_window(x, taps, state), weight, bias)


def conv_replay(
    x: Float[Tensor, "b s c"], path: Int[Tensor, "#b m"], state: Float[Tensor, "b c k-1"]
) -> Float[Tensor, "b c k-1"]:
    """The convolution's state after the pending slots `path`, in that order; -1 is padding, at the end only."""
    tail = state.shape[2]
    if path.shape[1] == 0:
        return state
    full = torch.cat([state.mT.to(x.dtype), _take(x, path)], 1)
    last = (path >= 0).sum(1, keepdim=True) + torch.arange(tail, device=x.device)  # #b k-1
    return _take(full, last).mT


def replay(
    conv_x: Float[Tensor, "b s c"],
    x: Float[Tensor, "b s h p"],
    dt: Float[Tensor, "b s h"],
    A: Float[Tensor, "h"] | Float[Tensor, "b 1 h"],
    B: Float[Tensor, "b s g n"],
    path: Int[Tensor, "#b m"],
    conv_state: Float[Tensor, "b c k-1"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b c k-1"], Float[Tensor, "b h p n"]]:
    """Both states after a path of pending slots, from the activations that their forward left behind.

    This is `commit(path)`; an empty path (or all -1) rolls back: the states come back as they were. Layers may be
    folded into the batch, A then has one row for each.

    Args:
        conv_x: what went into the convolution.
        x, dt, B: what went into the scan: after convolution and activation, bias and softplus.
        path: indices of pending slots, parents first, padded at the end with -1; one row if the batch shares it.
    """
    return conv_replay(conv_x, path, conv_state), ssd_replay(x, dt, A, B, path, state)


# ---- trees and lanes as indices --------------------------------------------------------------------------------------


def ancestors(parent: Int[Tensor, "b s"]) -> Bool[Tensor, "b s s"]:
    """[u, v]: v is u or one of its ancestors. A parent of -1 is the committed state. Any order; no loop over slots."""
    size = parent.shape[1]
    slot = torch.arange(size, device=parent.device)
    near = ((parent[..., None] == slot) | (slot[:, None] == slot)).float()
    reach = 1
    while reach < size - 1:  # the paths double in length
        near = (near @ near).clamp(max=1)
        reach *= 2
    return near > 0


def tree_taps(parent: Int[Tensor, "b s"], width: int) -> Int[Tensor, "b s k"]:
    """Where the window of each slot looks, nearest first, in the committed tail (k - 1 places) followed by the slots.

    A parent of -1 goes on in the committed tail.
    """
    b, s = parent.shape
    tail = width - 1
    place = torch.arange(tail + s, device=parent.device).expand(b, -1)
    # -2, for lanes only: starts from nothing, its places before itself are -1
    back = torch.where(parent < -1, -1, torch.where(parent < 0, tail - 1, parent + tail))
    back = torch.cat([place[:, :tail] - 1, back], 1)  # one place back, from anywhere
    taps = [place[:, tail:]]
    for _ in range(tail):
        taps.append(back.gather(1, taps[-1].clamp(min=0)))  # nothing stays nothing: the first place points to -1
    return torch.stack(taps, -1)


def _lane_taps(lane: Int[Tensor, "b s"], width: int) -> Int[Tensor, "b s+1 k"]:
    """`tree_taps` of packed samples, and of the slot that would come next in the last of them; -1: before it."""
    sample, before = samples(F.pad(lane, (0, 1), value=-1))
    old = F.pad(sample[:, :-1], (1, 0))
    return tree_taps(torch.where(sample != old, -2, before), width)


def _window(
    x: Float[Tensor, "b s c"], taps: Int[Tensor, "#b s k"], state: Float[Tensor, "b c k-1"]
) -> Float[Tensor, "b s k c"]:
    full = torch.cat([state.mT.to(x.dtype), x], 1)
    return _take(full, taps.flatten(1)).unflatten(1, taps.shape[1:])


def _weigh(
    window: Float[Tensor, "b s k c"], weight: Float[Tensor, "c k"], bias: Float[Tensor, "c"] | None
) -> Float[Tensor, "b s c"]:
    """Windows are nearest first, weights oldest first."""
    y = (window * weight.flip(1).mT).sum(2)
    return y if bias is None else y + bias


def _take(x: Float[Tensor, "b s *d"], slot: Int[Tensor, "#b m"]) -> Float[Tensor, "b m *d"]:
    """Slots of each row; negative ones read the first."""
    slot = slot.clamp(min=0)
    if slot.shape[0] == 1:
        return x.index_select(1, slot[0])
    return x[torch.arange(x.shape[0], device=x.device)[:, None], slot]


# ---- small things ----------------------------------------------------------------------------------------------------


def _promoted(*tensors: Tensor) -> Sequence[Tensor]:
    """All in their common type, float32 at least."""
    first = tensors[0].dtype
    if first in (torch.float32, torch.float64) and all(t.dtype == first for t in tensors):
        return tensors  # by far the commonest, and asked in every step
    kind = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.to(kind) for t in tensors]


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    b, s, h, p = x.shape
    if dt.shape != (b, s, h) or A.shape != (h,) or B.shape != C.shape or B.shape[:2] != (b, s) or h % B.shape[2]:
        raise ValueError(
            "shapes should be x (b, s, h, p), dt (b, s, h), A (h), B and C (b, s, g, n) with g dividing h; got "
            f"x {tuple(x.shape)}, dt {tuple(dt.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}"
        )
