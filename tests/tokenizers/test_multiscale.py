"""The multi-scale residual quantizer against its own laws and against a slow reference written from the formulae."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.tokenizers import MultiScaleVQ, phi_table

PYRAMIDS = [(1, 2, 4), (1, 2, 3, 5), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (4,), (1, 1, 1)]


def randomised(scales: tuple[int, ...], vocab: int = 11, dim: int = 3, seed: int = 0, **options: float) -> MultiScaleVQ:
    """Every weight drawn anew, in float64: defaults could hide a wrong phi or a dropped bias."""
    generator = torch.Generator().manual_seed(seed)
    vq = MultiScaleVQ(scales, vocab, dim, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in vq.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (1.0 if name == "codebook" else 0.3))
    return vq


def latent(vq: MultiScaleVQ, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vq.dim, vq.side, vq.side, generator=generator, dtype=torch.float64)


def draw_ids(vq: MultiScaleVQ, batch: int = 2, seed: int = 2) -> Tensor:
    return torch.randint(vq.vocab, (batch, vq.total), generator=torch.Generator().manual_seed(seed))


# ---- the reference: one latent map, loops, nothing of torch but sums -------------------------------------------------
def area_down(x: Tensor, p: int) -> Tensor:
    side = x.shape[-1]
    out = x.new_zeros(len(x), p, p)
    for i in range(p):
        for j in range(p):
            rows = slice(i * side // p, math.ceil((i + 1) * side / p))
            columns = slice(j * side // p, math.ceil((j + 1) * side / p))
            out[:, i, j] = x[:, rows, columns].mean(dim=(1, 2))
    return out


def bicubic_weights(p: int, side: int) -> Tensor:
    """(side, p): Keys' kernel with a = -0.75 at half-pixel centres, the edge repeated."""

    def kernel(t: float, a: float = -0.75) -> float:
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    weights = torch.zeros(side, p, dtype=torch.float64)
    for i in range(side):
        centre = (i + 0.5) * p / side - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(j, 0), p - 1)] += kernel(centre - j)
    return weights


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    side = x.shape[-1]
    out = bias[:, None, None].repeat(1, side, side)
    for i in range(side):
        for j in range(side):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < side and 0 <= j + dj < side:
                        out[:, i, j] += weight[:, :, di + 1, dj + 1] @ x[:, i + di, j + dj]
    return out


@torch.no_grad()
def reference(vq: MultiScaleVQ, f: Tensor, table: tuple[int, ...]) -> dict[str, Tensor]:
    """ids, f_hat after each scale, loss and teacher inputs of one latent map (dim, side, side)."""
    rest, f_hat, losses, ids, partial, inputs = f.clone(), torch.zeros_like(f), [], [], [], []
    for k, p in enumerate(vq.scales):
        pooled = rest if k == len(vq.scales) - 1 else area_down(rest, p)
        h = torch.zeros_like(pooled)
        for i in range(p):
            for j in range(p):
                distances = [(pooled[:, i, j] - code).square().sum().item() for code in vq.codebook]
                best = min(range(vq.vocab), key=distances.__getitem__)
                ids.append(best)
                h[:, i, j] = vq.codebook[best]
        if k < len(vq.scales) - 1:
            up = bicubic_weights(p, vq.side)
            h = torch.einsum("ap,bq,cpq->cab", up, up, h)
        phi = vq.phis[table[k]]
        assert isinstance(phi, nn.Conv2d) and phi.bias is not None
        h = 0.5 * h + 0.5 * conv3x3(h, phi.weight, phi.bias)
        f_hat, rest = f_hat + h, rest - h
        partial.append(f_hat)
        losses.append((0.25 + 1) * (f_hat - f).square().mean())
        if k < len(vq.scales) - 1:
            inputs.append(area_down(f_hat, vq.scales[k + 1]).flatten(1).T)
    return {
        "ids": torch.tensor(ids),
        "partial": torch.stack(partial),
        "loss": torch.stack(losses).mean(),
        "inputs": torch.cat(inputs) if inputs else f.new_zeros(0, vq.dim),
    }


def distance_to_reference(vq: MultiScaleVQ, table: tuple[int, ...]) -> float:
    """Largest difference in anything that both compute, on one latent map; infinite if the ids differ."""
    f = latent(vq, batch=1)
    want = reference(vq, f[0], table)
    quantized = vq.quantize(f)
    if not torch.equal(quantized.ids[0], want["ids"]):
        return math.inf
    pairs = [
        (torch.cat(vq.partial_latents(quantized.ids)), want["partial"]),
        (quantized.z_q[0], want["partial"][-1]),
        (quantized.loss, want["loss"]),
        (vq.teacher_inputs(quantized.ids)[0], want["inputs"]),
    ]
    return max((a - b).abs().max().item() for a, b in pairs if a.numel())


TABLES = {(1, 2, 4): (0, 2, 3), (1, 2, 3, 5): (0, 1, 2, 3), (4,): (0,), (1, 1, 1): (0, 2, 3), (2, 3, 3): (0, 2, 3)}


@pytest.mark.parametrize("scales", list(TABLES))
def test_agrees_with_a_slow_reference(scales: tuple[int, ...]) -> None:
    assert distance_to_reference(randomised(scales), TABLES[scales]) < 1e-12


def test_the_reference_catches_wrong_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: another phi, bilinear for bicubic, another weight of the commitment."""
    scales = (1, 2, 3, 5)
    assert distance_to_reference(randomised(scales), (0, 1, 2, 2)) > 1e-3
    assert distance_to_reference(randomised(scales, beta=0.3), TABLES[scales]) > 1e-3
    resize = F.interpolate

    def bilinear(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
        return resize(x, size=size, mode="bilinear" if mode == "bicubic" else mode)

    monkeypatch.setattr(F, "interpolate", bilinear)
    assert distance_to_reference(randomised(scales), TABLES[scales]) > 1e-3


# ---- phi table -------------------------------------------------------------------------------------------------------
def test_phi_table_of_the_released_weights() -> None:
    assert phi_table(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)


@pytest.mark.parametrize(
    ("scales", "phis", "table"),
    [
        (1, 4, (0,)),
        (4, 4, (0, 1, 2, 3)),
        (5, 4, (0, 1, 2, 2, 3)),
        (6, 4, (0, 0, 1, 2, 3, 3)),
        (3, 1, (0, 0, 0)),
        (3, 2, (0, 0, 1)),
        (8, 8, tuple(range(8))),
    ],
)
def test_phi_table_of_other_pyramids(scales: int, phis: int, table: tuple[int, ...]) -> None:
    """Written down from the official rule (nearest tick, ties as its floating point decides them)."""
    assert phi_table(scales, phis) == table


# ---- laws ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scales", PYRAMIDS)
def test_f_hat_and_rest_make_up_the_latent_at_every_scale(scales: tuple[int, ...]) -> None:
    vq = randomised(scales)
    f = latent(vq)
    for step in vq.analyse(f):
        torch.testing.assert_close(step.f_hat + step.rest, f, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scales", PYRAMIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ids_decode_to_the_latents_of_training(scales: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit: the last f_hat, the partial ones, and what the straight-through estimator hands to the decoder."""
    vq = randomised(scales).to(dtype)
    f = latent(vq).to(dtype).requires_grad_()
    quantized, steps = vq.quantize(f), list(vq.analyse(f))
    assert torch.equal(vq.decode_latent(quantized.ids), quantized.z_q)
    for step, partial in zip(steps, vq.partial_latents(quantized.ids), strict=True):
        assert torch.equal(step.f_hat, partial)


@pytest.mark.parametrize("scales", PYRAMIDS)
def test_teacher_inputs_are_those_met_step_by_step(scales: tuple[int, ...]) -> None:
    vq = randomised(scales).float()
    ids = draw_ids(vq, batch=3)
    f_hat, met = torch.zeros(3, vq.dim, vq.side, vq.side), [torch.zeros(3, 0, vq.dim)]
    for k, ids_k in enumerate(vq.split(ids)[:-1]):
        f_hat = f_hat + vq.contribution(ids_k, k)
        met.append(vq.next_input(f_hat, k))
    assert torch.equal(vq.teacher_inputs(ids), torch.cat(met, dim=1))
    assert vq.teacher_inputs(ids).shape == (3, vq.total - vq.sizes[0], vq.dim)


def test_a_codebook_of_the_rests_rebuilds_the_latent() -> None:
    """With phi = identity, and codewords for every vector that is met, nothing is left after the last scale."""
    scales = (1, 2, 4)
    vq = randomised(scales, vocab=1 + 4 + 16, phi_ratio=0.0)
    f = latent(vq, batch=1)
    with torch.no_grad():
        for k, start in enumerate((0, 1, 5)):
            pooled = list(vq.analyse(f))[k].pooled.flatten(2)[0].T
            vq.codebook[start : start + len(pooled)] = pooled
    last = list(vq.analyse(f))[-1]
    assert torch.equal(last.rest, torch.zeros_like(f))
    torch.testing.assert_close(vq.quantize(f).z_q, f, rtol=0, atol=1e-14)


def test_scales_of_one_pixel_are_residual_quantization() -> None:
    """A pyramid of n maps of size 1 with phi = identity is RQ: each code is nearest to what the former left over."""
    vq = randomised((1, 1, 1, 1), phi_ratio=0.0)
    f = latent(vq, batch=5)
    rest, ids = f.flatten(1), []
    for _ in range(4):
        ids.append(torch.cdist(rest, vq.codebook).argmin(dim=1))
        rest = rest - vq.codebook[ids[-1]]
    quantized = vq.quantize(f)
    assert torch.equal(quantized.ids, torch.stack(ids, dim=1))
    torch.testing.assert_close(quantized.z_q.flatten(1), f.flatten(1) - rest, rtol=0, atol=1e-12)


def test_rows_do_not_depend_on_their_company() -> None:
    vq = randomised((1, 2, 3, 5))
    f = latent(vq, batch=6)
    order = torch.tensor([4, 1])
    assert torch.equal(vq.quantize(f).ids[order], vq.quantize(f[order]).ids)


def test_autocast_changes_nothing() -> None:
    vq = randomised((1, 2, 4)).float()
    f = latent(vq).float()
    want = vq.quantize(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, inputs = vq.quantize(f), vq.teacher_inputs(want.ids)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.z_q, want.z_q) and torch.equal(got.loss, want.loss)
    assert torch.equal(inputs, vq.teacher_inputs(want.ids))


# ---- gradients -------------------------------------------------------------------------------------------------------
def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_the_decoder_s_gradient_goes_straight_to_the_encoder() -> None:
    vq = randomised((1, 2, 4))
    f = latent(vq).requires_grad_()
    weight = latent(vq, seed=9)
    (vq.quantize(f).z_q * weight).sum().backward()
    assert torch.equal(gradient(f), weight)
    assert all(parameter.grad is None for parameter in vq.parameters())


def test_the_loss_trains_codebook_phi_and_encoder() -> None:
    vq = randomised((1, 2, 3, 5))
    f = latent(vq).requires_grad_()
    quantized = vq.quantize(f)
    quantized.loss.backward()
    used = quantized.ids.unique()
    assert (gradient(vq.codebook)[used].abs().sum(dim=1) > 0).all()
    unused = torch.ones(vq.vocab, dtype=torch.bool).index_fill(0, used, False)
    assert not gradient(vq.codebook)[unused].any()
    assert all(gradient(parameter).abs().sum() > 0 for parameter in vq.phis.parameters())
    partial = torch.stack(vq.partial_latents(quantized.ids))
    by_hand = (2 * vq.beta * (f - partial) / f.numel()).mean(dim=0)
    torch.testing.assert_close(gradient(f), by_hand, rtol=0, atol=1e-14)


# ---- the edge --------------------------------------------------------------------------------------------------------
def test_stats_count_the_codes() -> None:
    vq = randomised((1, 2, 4))
    quantized = vq.quantize(latent(vq))
    assert quantized.stats["hits"].shape == (3, vq.vocab)
    assert quantized.stats["hits"].sum(dim=1).tolist() == [2, 8, 32]
    assert quantized.stats["used"] == quantized.ids.unique().numel()
    assert 1 <= quantized.stats["perplexity"] <= quantized.stats["used"] + 1e-6


@pytest.mark.parametrize("scales", [(), (0, 2), (4, 2)])
def test_impossible_scales_are_refused(scales: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="coarse to fine"):
        MultiScaleVQ(scales, 8, 4)


def test_wrong_shapes_are_refused() -> None:
    vq = randomised((1, 2, 4))
    with pytest.raises(ValueError, match="latent"):
        vq.quantize(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ValueError, match="21 ids"):
        vq.decode_latent(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="after one of"):
        vq.split(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="2x2"):
        vq.contribution(torch.zeros(1, 1, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="no scale follows"):
        vq.next_input(torch.zeros(1, 3, 4, 4), 2)


# ---- other analyses --------------------------------------------------------------------------------------------------


class Halves(MultiScaleVQ):
    """Two bands: the mean over all places, then the rest of the map, as the first rings of NFIG."""

    def bands(self, f):
        mean = f.mean((2, 3), keepdim=True).expand_as(f)
        return [mean, f - mean]


def test_bands_are_coded_with_what_the_coarser_scales_left() -> None:
    """After each scale, f_hat + rest is the sum of the bands so far, and what is coded is that sum less f_hat."""
    torch.manual_seed(0)
    vq, f = Halves((1, 2, 4), 16, 3, phis=1, phi_ratio=0.0), torch.randn(2, 3, 4, 4)
    bands, steps = vq.bands(f), list(vq.analyse(f))
    for k, step in enumerate(steps):
        torch.testing.assert_close(step.f_hat + step.rest, sum(bands[: k + 1]))
    torch.testing.assert_close(steps[0].pooled, f.mean((2, 3), keepdim=True))
    before = sum(bands[:2]) - steps[0].f_hat
    torch.testing.assert_close(steps[1].pooled, torch.nn.functional.avg_pool2d(before, 2))


def test_one_band_of_everything_is_the_residual_scheme() -> None:
    class Whole(MultiScaleVQ):
        def bands(self, f):
            return [f, torch.zeros_like(f), torch.zeros_like(f)]

    torch.manual_seed(0)
    one, f = MultiScaleVQ((1, 2, 4), 16, 3), torch.randn(2, 3, 4, 4)
    other = Whole((1, 2, 4), 16, 3)
    other.load_state_dict(one.state_dict())
    for a, b in zip(one.analyse(f), other.analyse(f), strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.f_hat, b.f_hat) and torch.equal(a.rest, b.rest)
