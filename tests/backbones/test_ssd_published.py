"""A Mamba-2 mixer made of the fast forms equals the published one, also where it scores and keeps drafts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from seriatim.backbones.ssd import (
    ancestors,
    causal_conv,
    conv_step,
    replay,
    ssd_chunked,
    ssd_step,
    ssd_tree,
    tree_conv,
    tree_taps,
)
from support.lines import path_to


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Mixer:
    """A Mamba-2 mixer assembled from these functions, on the published one's weights; `wrong` names one mistake."""

    def __init__(self, official: Mamba2Mixer, wrong: str = "") -> None:
        self.o, self.wrong = official, wrong

    def open(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, what enters the convolution, steps: (b, s, ...)."""
        o = self.o
        z, xBC, dt = o.in_proj(hidden).split([o.intermediate_size, o.conv_dim, o.num_heads], -1)
        if self.wrong == "gate last":
            xBC, z, dt = o.in_proj(hidden).split([o.conv_dim, o.intermediate_size, o.num_heads], -1)
        return z, xBC, F.softplus(dt if self.wrong == "no step bias" else dt + o.dt_bias)

    @property
    def weight(self) -> tuple[Tensor, Tensor]:
        taps = self.o.conv1d.weight[:, 0]
        return taps.flip(1) if self.wrong == "kernel reversed" else taps, self.o.conv1d.bias

    def scan_inputs(self, conv: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        o = self.o
        if self.wrong != "no activation":
            conv = F.silu(conv)
        x, B, C = conv.split([o.intermediate_size, o.n_groups * o.ssm_state_size, o.n_groups * o.ssm_state_size], -1)
        if self.wrong == "B and C swapped":
            B, C = C, B
        lead = conv.shape[:-1]
        x = x.reshape(*lead, o.num_heads, o.head_dim)
        if self.wrong == "B without the step":
            x = x / dt[..., None]
        B, C = (t.reshape(*lead, o.n_groups, o.ssm_state_size) for t in (B, C))
        if self.wrong == "groups dealt out":
            deal = torch.arange(o.num_heads) % o.n_groups
            B, C = B[..., deal, :], C[..., deal, :]
        A = -torch.exp(o.A_log)
        return x, dt, (-o.A_log.abs() if self.wrong == "A without its exponential" else A), B, C

    def close(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        o = self.o
        if self.wrong != "no skip":
            y = y + o.D[:, None] * x
        y, gate = y.flatten(-2), F.silu(z)
        if self.wrong != "gate after the norm":
            y = y * gate
        parts = y.unflatten(-1, (1 if self.wrong == "norm over all groups" else o.n_groups, -1))
        y = o.norm.weight * (parts * (parts.pow(2).mean(-1, keepdim=True) + o.layer_norm_epsilon).rsqrt()).flatten(-2)
        return o.out_proj(y * gate if self.wrong == "gate after the norm" else y)

    def zero(self, b: int) -> tuple[Tensor, Tensor]:
        o = self.o
        conv_state = torch.zeros(b, o.conv_dim, o.conv_kernel_size - 1)
        return conv_state, torch.zeros(b, o.num_heads, o.head_dim, o.ssm_state_size)

    def packed(self, hidden: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        z, xBC, dt = self.open(hidden)
        conv, conv_state = causal_conv(xBC, *self.weight, states[0])
        args = self.scan_inputs(conv, dt)
        y, state = ssd_chunked(*args, 8, states[1])
        return self.close(y, args[0], z), (conv_state, state)

    def stepwise(self, hidden: Tensor, states: tuple[Tensor, Tensor]) -> Tensor:
        out = []
        conv_state, state = states
        for t in range(hidden.shape[1]):
            z, xBC, dt = self.open(hidden[:, t])
            conv, conv_state = conv_step(xBC, *self.weight, conv_state)
            if self.wrong == "conv state reversed":
                conv_state = conv_state.flip(-1)
            x, dt, A, B, C = self.scan_inputs(conv, dt)
            y, state = ssd_step(x, dt, A, B, C, state)
            out.append(self.close(y, x, z))
        return torch.stack(out, 1)

    def tree(
        self, hidden: Tensor, parent: Tensor, states: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """Outputs of a draft tree, and `commit`: from a path to the states after it."""
        z, xBC, dt = self.open(hidden)
        conv = tree_conv(xBC, *self.weight, tree_taps(parent, self.o.conv_kernel_size), states[0])
        args = self.scan_inputs(conv, dt)
        y = ssd_tree(*args, ancestors(parent), states[1])
        return self.close(y, args[0], z), lambda path: replay(xBC, *args[:4], path, *states)


def official(groups: int) -> Mamba2Mixer:
    """Tiny, with every parameter random and large enough to matter (the initial ones hide gates, skips and decays)."""
    config = Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, expand=2, state_size=6, n_groups=groups, conv_kernel=4, chunk_size=8
    )
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            scale = 0.7 if parameter.dim() > 1 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random) + (1.0 if "norm" in name else 0.0))
    return mixer


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(params=[1, 2], ids=["one group", "two groups"])
def published(request: pytest.FixtureRequest) -> Mamba2Mixer:
    return official(request.param)


HIDDEN = torch.randn(2, 29, 16, generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_the_mixer_is_the_published_one(published: Mamba2Mixer) -> None:
    ours, want = Mixer(published), published(HIDDEN)
    assert far(ours.packed(HIDDEN, ours.zero(2))[0], want) < 5e-6
    assert far(ours.stepwise(HIDDEN, ours.zero(2)), want) < 5e-6
    start, states = ours.packed(HIDDEN[:, :11], ours.zero(2))
    assert far(torch.cat([start, ours.stepwise(HIDDEN[:, 11:], states)], 1), want) < 5e-6


@pytest.mark.parametrize(
    "wrong",
    [
        "B without the step",
        "kernel reversed",
        "conv state reversed",
        "gate after the norm",
        "gate last",
        "no step bias",
        "no activation",
        "no skip",
        "B and C swapped",
        "groups dealt out",
        "norm over all groups",
        "A without its exponential",
    ],
)
@torch.no_grad()
def test_a_mixer_with_one_mistake_is_not(wrong: str) -> None:
    theirs = official(2)
    ours = Mixer(theirs, wrong)
    assert far(ours.stepwise(HIDDEN, ours.zero(2)), theirs(HIDDEN)) > 1e-2


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 9])
@torch.no_grad()
def test_a_tree_is_scored_as_the_published_mixer_scores_its_paths(published: Mamba2Mixer, prefix: int) -> None:
    """Also where the prefix is shorter than the kernel."""
    ours = Mixer(published)
    states = ours.zero(1) if prefix == 0 else ours.packed(HIDDEN[:1, :prefix], ours.zero(1))[1]
    parent = [-1, 0, 0, 1, 1, 3, 2, 5, -1]
    draft = HIDDEN[:1, 15 : 15 + len(parent)]
    y, _ = ours.tree(draft, torch.tensor([parent]), states)
    for u in range(len(parent)):
        sequence = torch.cat([HIDDEN[:1, :prefix], draft[:, path_to(parent, u)]], 1)
        assert far(y[0, u], published(sequence)[0, -1]) < 2e-5


@torch.no_grad()
def test_fifty_rounds_of_draft_and_commit_equal_one_fresh_forward(published: Mamba2Mixer) -> None:
    """Each row keeps its own path of a random tree, sometimes none; float64, so that nothing drifts unseen."""
    ours = Mixer(published.double())
    random = torch.Generator().manual_seed(3)
    states = tuple(t.double() for t in ours.zero(2))
    kept: list[list[Tensor]] = [[], []]
    read: list[list[Tensor]] = [[], []]
    for _ in range(50):
        parent = [[int(torch.randint(-1, u, (), generator=random)) for u in range(7)] for _ in range(2)]
        draft = torch.randn(2, 7, 16, generator=random, dtype=torch.float64)
        y, commit = ours.tree(draft, torch.tensor(parent), states)  # type: ignore[arg-type]
        ends = torch.randint(-1, 7, (2,), generator=random).tolist()
        paths = [path_to(parent[row], ends[row]) for row in range(2)]
        states = commit(torch.tensor([path + [-1] * (7 - len(path)) for path in paths]))
        for row, path in enumerate(paths):
            kept[row] += list(draft[row, path])
            read[row] += list(y[row, path])
    for row in range(2):
        zero = tuple(t.double() for t in ours.zero(1))
        fresh, end = ours.packed(torch.stack(kept[row])[None], zero)  # type: ignore[arg-type]
        close(torch.stack(read[row]), fresh[0])
        for got, want in zip(states, end, strict=True):
            close(got[row], want[0])
