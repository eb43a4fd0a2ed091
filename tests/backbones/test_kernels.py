"""Where a part has two ways to one result, for speed, both give it: values and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seriatim.backbones.attention import BLOCK, attend, attend_by_blocks, by_blocks, placed
from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.norm import SMALL, rms_norm

WIDTH = 16


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 3, 1000], ids=["one", "few", "many"])
def test_both_ways_to_the_root_mean_square_are_one(rows):
    """Few numbers take another kernel than many: the same values and gradients, with and without weights."""
    for weight in (noise(WIDTH, seed=2).requires_grad_(), None):
        x = (100 * noise(rows, WIDTH)).requires_grad_()
        leaves = [x] if weight is None else [x, weight]
        want = x / (x.pow(2).mean(-1, keepdim=True) + 0.3).sqrt() * (1 if weight is None else weight)
        got = rms_norm(x, weight, 0.3)
        assert (got - want).abs().max() < 1e-12 and (rows * WIDTH > SMALL) == (rows == 1000)
        grads = [torch.autograd.grad((y * noise(rows, WIDTH, seed=3)).sum(), leaves) for y in (got, want)]
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mask", ["causal", "some", None])
@pytest.mark.parametrize("n", [3, BLOCK, BLOCK + 5, 2 * BLOCK + 1])
def test_attention_by_blocks_is_attention(n, mask):
    """Values and gradients, whole blocks and rests; it is taken where bf16 is trained on a CPU, and nowhere else."""
    q, k, v = (noise(2, 3 * n, 8, seed=i).view(2, 3, n, 8).requires_grad_() for i in range(3))
    added = None
    if mask == "some":
        seen = (noise(2, n, n, seed=5) > 0)[:, None] | torch.eye(n, dtype=torch.bool)
        added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    got = attend_by_blocks(q, k, v, added if mask == "some" else mask, None)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, added, is_causal=mask == "causal")
    assert (got - want).abs().max() < 1e-12
    weight = noise(2, 3 * n, 8, seed=4).view_as(got)
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (got, want)]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))
    assert by_blocks(q.bfloat16()) and not by_blocks(q) and not by_blocks(q.detach().bfloat16())


@pytest.mark.parametrize("mask", ["causal", "some", None])
def test_capped_attention_of_heads_that_share_keys_is_attention_where_the_cap_is_far(mask):
    """The explicit kernel beside torch's, keys shared by pairs of heads; a near cap changes it."""
    n, c = 5, TransformerConfig(32, 1, 4, 2, softcap=1e9)
    q, k, v = noise(2, 4 * n, 8).view(2, 4, n, 8), *(noise(2, 2 * n, 8, seed=i).view(2, 2, n, 8) for i in (2, 3))
    seen = (noise(2, n, n, seed=5) > 0)[:, None] | torch.eye(n, dtype=torch.bool)
    given = placed(seen, c, q, None) if mask == "some" else mask
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, seen if mask == "some" else None, is_causal=mask == "causal", enable_gqa=True
    )
    assert (attend(c, q, k, v, given) - want).abs().max() < 1e-7
    assert (attend(replace(c, softcap=0.5), q, k, v, given) - want).abs().max() > 1e-3
    assert (attend(replace(c, softcap=None), q, k, v, given) - want).abs().max() < 1e-12
