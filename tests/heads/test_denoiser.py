"""The network that diffusion and flow heads share is the published one, formula for formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seriatim.heads.denoiser import Denoiser, time_features
from seriatim.laws.case import randomise

WIDTH, DIM, OUT, HIDDEN, BLOCKS = 6, 4, 8, 16, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net_of(seed=0):
    return randomise(Denoiser(WIDTH, DIM, OUT, HIDDEN, BLOCKS), seed, std=0.3)


def norm(x):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()


def published(w, x, t, h):
    """Li et al. 2024, official code, for one value: weights by name, a time from 0 to 1,000, a hidden state."""
    frequency = [math.exp(-math.log(10_000) * i / 128) for i in range(128)]
    waves = [math.cos(t * f) for f in frequency] + [math.sin(t * f) for f in frequency]
    waves = torch.tensor(waves, dtype=torch.float64)
    time = w["time.2.weight"] @ F.silu(w["time.0.weight"] @ waves + w["time.0.bias"]) + w["time.2.bias"]
    y = F.silu(time + w["state.weight"] @ h + w["state.bias"])
    x = w["value.weight"] @ x + w["value.bias"]
    for i in range(BLOCKS):
        mine = f"blocks.{i}."
        b = {name.removeprefix(mine): p for name, p in w.items() if name.startswith(mine)}
        shift, scale, gate = (b["modulation.weight"] @ y + b["modulation.bias"]).chunk(3)
        inside = (norm(x) * b["norm.weight"] + b["norm.bias"]) * (1 + scale) + shift
        inside = b["down.weight"] @ F.silu(b["up.weight"] @ inside + b["up.bias"]) + b["down.bias"]
        x = x + gate * inside
    shift, scale = (w["modulation.weight"] @ y + w["modulation.bias"]).chunk(2)
    return w["out.weight"] @ (norm(x) * (1 + scale) + shift) + w["out.bias"]


@pytest.mark.parametrize("t", [0.0, 1.0, 250.5, 999.0])
@torch.no_grad()
def test_the_network_is_the_published_one(t):
    net, x, h = net_of(), normal(5, DIM), normal(5, WIDTH, seed=1)
    got = net(x, net.clock(torch.full((5,), t).double()) + net.state(h))
    want = torch.stack([published(dict(net.named_parameters()), a, t, b) for a, b in zip(x, h, strict=True)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@torch.no_grad()
def test_values_are_denoised_each_for_itself():
    """Any shape in front, and nothing passes from one value to another."""
    net, x, y = net_of(), normal(2, 3, 4, DIM), normal(2, 3, 4, HIDDEN, seed=1)
    got = net(x, y)
    assert got.shape == (2, 3, 4, OUT)
    torch.testing.assert_close(got.flatten(0, 2), net(x.flatten(0, 2), y.flatten(0, 2)), rtol=0, atol=1e-12)
    x[1, 2, 3] += 1
    assert int(((net(x, y) - got).abs().amax(-1) > 1e-9).sum()) == 1


@torch.no_grad()
def test_times_are_told_apart_from_the_first_to_the_last():
    told = time_features(torch.arange(1000).double())
    distance = torch.cdist(told, told) + 10 * torch.eye(1000)
    assert float(distance.min()) > 0.5


@torch.no_grad()
def test_it_starts_at_zero_with_the_published_weights():
    torch.manual_seed(0)
    net = Denoiser(64, 16, 16, 256, 2)
    assert all(bool((p == 0).all()) for name, p in net.named_parameters() if "modulation" in name or "out." in name)
    assert float(net.time[0].weight.std()) == pytest.approx(0.02, rel=0.05)
    for layer in (net.state, net.value, net.blocks[0].up):  # uniform with variance 2 / (inputs + outputs)
        assert float(layer.weight.var()) == pytest.approx(2 / sum(layer.weight.shape), rel=0.1)
        assert bool((layer.bias == 0).all())
