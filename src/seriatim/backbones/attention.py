"""Attention of a layer over what its view shows: which kernel, in which shape, with which mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.backbones.cache import KVCache
from seriatim.backbones.layer import TransformerConfig, Weights
from seriatim.backbones.norm import normalise, rms_norm
from seriatim.plan import Plan
from seriatim.processor import capabilities

LOG_100 = 4.605170185988092  # the largest logarithm of a learned temperature, as in VAR


def normalise_heads(c: TransformerConfig, w: Weights, qk: Float[Tensor, "b s h d"]) -> Float[Tensor, "b s h d"]:
    """Queries and keys, normalised as the config says (`qk_norm`)."""
    q, k = qk[:, :, : c.heads], qk[:, :, c.heads :]
    if c.qk_norm == "l2":
        qk = F.normalize(qk, dim=-1)
        temperature = w["q_norm"].clamp(max=LOG_100).exp()
        return torch.cat([qk[:, :, : c.heads] * temperature, qk[:, :, c.heads :]], 2)
    if c.qk_norm == "rms":
        return torch.cat([rms_norm(q, w["q_norm"], c.eps), rms_norm(k, w["k_norm"], c.eps)], 2)
    if c.qk_norm == "layer":
        q = normalise("layer", q, w["q_norm"], w["q_norm_bias"], c.eps)
        return torch.cat([q, normalise("layer", k, w["k_norm"], w["k_norm_bias"], c.eps)], 2)
    q = rms_norm(q.flatten(2), w["q_norm"], c.eps).view_as(q)
    return torch.cat([q, rms_norm(k.flatten(2), w["k_norm"], c.eps).view_as(k)], 2)


def attend(
    c: TransformerConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | str | None, training: bool = False
) -> Float[Tensor, "b h n d"]:
    """Attention where heads share keys, scores are capped, or the mask is "causal"; else `mask` is None or what
    `placed` gives."""
    b, heads, n, d = q.shape
    groups = k.shape[1]
    if c.softcap is not None or (training and by_blocks(q)):
        if groups < heads:
            k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
            mask = mask[:, :, :n] if isinstance(mask, Tensor) and mask.shape[2] > n else mask  # rows were repeated
        return attend_by_blocks(q, k, v, mask, c.score_scale, c.softcap)
    if isinstance(mask, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=c.score_scale, enable_gqa=groups < heads)
    if groups == heads:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=c.score_scale)
    # queries that share keys become rows of one head: no copy of the keys
    q = q.reshape(b, groups, heads // groups * n, d)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=c.score_scale).reshape(b, heads, n, d)


def fast_to_attend(dtype: torch.dtype, kind: str) -> bool:
    """Whether torch's attention of a few queries takes keys in this format without a loss of time on a kind of device.
    In bfloat16 on a CPU: where it multiplies that in vectors and not in tiles, up to twice as fast as in float32 from
    32 rows on; with tiles (AMX), or without such instructions, a third as fast."""
    if dtype != torch.bfloat16 or kind != "cpu":
        return True
    has = capabilities()
    return bool(has.get("avx512_bf16")) and not has.get("amx_bf16")


BLOCK = 256  # queries that are attended together


def by_blocks(q: Float[Tensor, "b h n d"]) -> bool:
    """Training in bf16 on a CPU, where torch's fused attention takes up to twice the time of products and a softmax;
    as long as the scores are small."""
    return q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad and q.shape[2] <= 4 * BLOCK


def attend_by_blocks(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], mask: Tensor | str | None,
    scale: float | None, softcap: float | None = None,
) -> Float[Tensor, "b h n d"]:  # fmt: skip
    """Attention, a block of queries at a time; where it is causal over the keys up to it: half of the products are
    never made. `softcap` bounds the scores, smoothly (Gemma 2, arXiv 2408.00118)."""
    n, d = q.shape[2:]
    q = q * (d**-0.5 if scale is None else scale)
    out = []
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        seen = end if isinstance(mask, str) else k.shape[2]
        scores = q[:, :, start:end] @ k[:, :, :seen].transpose(2, 3)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if isinstance(mask, Tensor):
            scores += mask[:, :, start:end].to(q.dtype)
        elif mask is not None:
            scores[..., start:] += torch.full(
                (end - start, end - start), -torch.inf, dtype=q.dtype, device=q.device
            ).triu(1)
        out.append(torch.softmax(scores, -1) @ v[:, :, :seen])
    return torch.cat(out, 2)


def placed(mask: Tensor, c: TransformerConfig, x: Tensor, cache: KVCache | None) -> Tensor | None:
    """The mask as attention wants it, once for all layers: where the vectors are, rows repeated for the queries that
    share a key-value head, and as what is added to the scores. None where a step of decoding sees everything."""
    if cache is not None and bool(mask.all()):
        return None
    mask = mask.to(x.device)
    if c.groups < c.heads:
        mask = mask.repeat(1, 1, c.heads // c.groups, 1)
    kind = x.dtype if cache is None else cache.dtype
    return torch.zeros(mask.shape, dtype=kind, device=x.device).masked_fill_(~mask, -torch.inf)


def partial(
    mask: Tensor | str | None, plan: Plan, cache: KVCache | None, layer: int
) -> tuple[Bool[Tensor, "b 1 q k"], Bool[Tensor, "s"] | None]:
    """The mask in a layer that some slots skip: their keys are not there; and which of the new slots run."""
    n = plan.size
    old = 0 if cache is None else cache.columns
    ran = None if plan.layers is None else plan.layers[layer].cpu()
    if not isinstance(mask, Tensor):
        full = torch.ones(n, old + n, dtype=torch.bool)
        mask = (full if mask is None else full.tril(old))[None, None]
    known = None if cache is None else cache.computed(layer)
    known = torch.ones(1, old, dtype=torch.bool) if known is None else known
    new = torch.ones(n, dtype=torch.bool) if ran is None else ran
    there = torch.cat([known, new.expand(len(known), -1)], 1)
    own = torch.eye(n, old + n, dtype=torch.bool).roll(old, 1)
    return mask.cpu() & there[:, None, None] | own, ran
