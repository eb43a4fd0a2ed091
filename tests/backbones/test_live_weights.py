"""Backbones read their weights in each forward: assigned, replaced, lent for a call, or computed from others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from seriatim.backbones.hybrid import Hybrid, HybridConfig
from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.factorization.line import Line
from seriatim.layout import line

X = torch.randn(1, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PLAN = Line(1).packed(Canvas(line(5), {"token": torch.zeros(1, 5, dtype=torch.long)}))


def said(backbone):
    return backbone(X, PLAN)


@pytest.fixture(params=["mamba", "transformer", "hybrid"])
def two(request):
    """Two backbones of one shape and different weights."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        if request.param == "hybrid":
            mixer = MambaConfig(16, 1, head_dim=8, state=8)
            made.append(Hybrid(HybridConfig(16, 2, 2, attends=(1,), mixer=mixer)).double())
        elif request.param == "mamba":
            made.append(Mamba(MambaConfig(16, 2, head_dim=8, state=8)).double())
        else:
            made.append(Transformer(TransformerConfig(16, 2, 2)).double())
    assert not torch.allclose(said(made[0]), said(made[1]))
    return made


def test_weights_that_are_assigned_count(two):
    a, b = two
    a.load_state_dict(b.state_dict(), assign=True)
    assert torch.equal(said(a), said(b))


def test_a_layer_that_is_replaced_counts(two):
    a, b = two
    mixed = said(a)
    a.layers[1] = b.layers[1]
    assert not torch.allclose(said(a), mixed)
    a.layers[0], a.norm = b.layers[0], b.norm
    assert torch.equal(said(a), said(b))


def test_a_functional_call_uses_the_weights_that_it_is_given(two):
    a, b = two
    for weights, want in ((dict(b.named_parameters()), said(b)), (dict(a.named_parameters()), said(a))):
        assert torch.equal(torch.func.functional_call(a, weights, (X, PLAN)), want)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_parametrised_matrix_is_computed_in_each_forward(two):
    a, b = two
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.layers[1].out.mul_(2)
    register_parametrization(a.layers[1], "out", Doubled())
    assert torch.allclose(said(a), said(b), rtol=0, atol=1e-12)
    with torch.no_grad():
        a.layers[1].parametrizations.out.original.mul_(3)
        b.layers[1].out.mul_(3)
    assert torch.allclose(said(a), said(b), rtol=0, atol=1e-12)
