"""Rings of frequencies as the analysis of a pyramid: a partition, and what is coded of it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from seriatim.tokenizers.multiscale import SCALES, MultiScaleVQ
from seriatim.tokenizers.rings import RingConfig, RingTokenizer, RingVQ, radius, ring_edges, ring_masks

WAYS = ("tokens", "linear", "log")


def made(scales=(1, 2, 3, 4), vocab=16, rings="tokens", seed=0):
    torch.manual_seed(seed)
    return RingConfig(scales=scales, vocab=vocab, dim=3, rings=rings).quantizer().double()


def latent(side, seed=1):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("rings", WAYS)
@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4, 5), SCALES[8], SCALES[16]], ids=str)
def test_rings_cover_the_plane_once_and_bands_add_up(scales, rings):
    vq, f, side = made(scales, rings=rings), latent(scales[-1]), scales[-1]
    masks = ring_masks(side, ring_edges(scales, rings))
    assert bool((masks.sum(0) == 1).all()) and len(masks) == len(scales)
    bands = vq.bands(f)
    torch.testing.assert_close(sum(bands), f, rtol=0, atol=1e-12)
    energies = sum(band.square().sum() for band in bands)
    torch.testing.assert_close(energies, f.square().sum(), rtol=1e-12, atol=0)
    for band, mask in zip(bands, masks, strict=True):  # by the whole plane: real without being made so
        whole = torch.fft.ifft2(torch.fft.fft2(f) * mask)
        assert float(whole.imag.abs().max()) < 1e-12
        torch.testing.assert_close(band, whole.real, rtol=0, atol=1e-12)


def test_an_open_last_ring_would_lose_the_corner():
    edges = ring_edges(SCALES[8])
    assert not bool((radius(8)[4, 4] < edges[-1]).any()), "the corner lies on the last edge"
    assert bool(ring_masks(8, edges)[-1, 4, 4])


def test_rings_of_the_paper():
    """The first is the mean, the next four are empty: their edges stay below one cycle."""
    edges = ring_edges(SCALES[16])
    assert [round(e, 3) for e in (edges[0], edges[4], edges[-1])] == [0.017, 0.915, 11.314]
    counts = ring_masks(16, edges).sum((1, 2)).tolist()
    assert counts[:5] == [1, 0, 0, 0, 0] and min(counts[5:]) > 0 and sum(counts) == 256


@pytest.mark.parametrize("rings", WAYS)
def test_what_a_band_lacks_is_carried_on(rings):
    """After every scale the bands so far are f_hat and the rest, and coded is the band with the rest before it."""
    vq, f = made(rings=rings), latent(4)
    bands, rest = vq.bands(f), torch.zeros_like(f)
    for k, step in enumerate(vq.analyse(f)):
        side = vq.scales[k]
        want = F.interpolate(bands[k], size=(side, side), mode="area")
        want = want + F.interpolate(rest, size=(side, side), mode="area")
        torch.testing.assert_close(step.pooled, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(sum(bands[: k + 1]), step.f_hat + step.rest, rtol=0, atol=1e-12)
        rest = step.rest


def test_everything_in_the_first_ring_is_the_residual_scheme_without_phi():
    one, f = made(), latent(4)
    one.edges = (99.0,) * 4
    other = MultiScaleVQ((1, 2, 3, 4), 16, 3, phis=1, phi_ratio=0.0).double()
    other.load_state_dict(one.state_dict())
    for a, b in zip(one.analyse(f), other.analyse(f), strict=True):
        assert torch.equal(a.ids, b.ids)
        torch.testing.assert_close(a.rest, b.rest, rtol=0, atol=1e-12)
    assert not torch.equal(made().quantize(f).ids, other.quantize(f).ids), "rings change nothing"


def test_a_codebook_of_the_last_rests_is_lossless():
    """The finest scale is not resized: with its rests as codes nothing is lost. The coarser ones code nothing."""
    f = latent(4)[:1]
    vq = RingVQ((1, 4), 17, 3, phis=1, phi_ratio=0.0).double()
    with torch.no_grad():
        vq.codebook.copy_(torch.cat([f[0].flatten(1).T - f.mean((2, 3)), f.mean((2, 3))]))
    out = vq.quantize(f)
    torch.testing.assert_close(out.z_q, f, rtol=0, atol=1e-12)
    torch.testing.assert_close(vq.decode_latent(out.ids), f, rtol=0, atol=1e-12)


def test_the_loss_is_that_of_the_whole_sum():
    vq, f = made(), latent(4).requires_grad_()
    out = vq.quantize(f)
    torch.testing.assert_close(out.loss, 1.25 * F.mse_loss(out.z_q, f))
    out.loss.backward()
    assert f.grad is not None and bool(f.grad.any()) and bool(vq.codebook.grad.any())
    assert torch.equal(out.z_q, vq.decode_latent(out.ids))


def test_partial_sums_go_from_low_to_high():
    """With codes at hand for what is coded, partial sums are the low-pass versions as well as their grids can hold."""
    f = latent(8)
    vq = RingVQ(SCALES[8], 1, 3, phis=1, phi_ratio=0.0).double()
    vq.rings = "linear"
    low = torch.stack(vq.bands(f)).cumsum(0)
    power = torch.fft.fft2(low).abs().square().sum((1, 2))
    for k, edge in enumerate(ring_edges(SCALES[8], "linear")[:-1]):
        assert float(power[k][radius(8) >= edge].max()) < 1e-20 < float(power[k][radius(8) < edge].min())


def test_unknown_rings_are_refused_and_scales_can_be_skipped():
    with pytest.raises(ValueError, match="rings are tokens, linear, log"):
        RingConfig(rings="square")
    vq, f = made(), latent(4)
    vq.skip(1)
    assert len(vq.bands(f)) == 3
    torch.testing.assert_close(sum(vq.bands(f)), f, rtol=0, atol=1e-12)


def test_the_tokenizer_learns_pictures():
    torch.manual_seed(0)
    tokenizer = RingTokenizer(RingConfig(scales=(1, 2, 4), vocab=16, dim=4, width=8))
    g = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(16, 1, 2, 2, generator=g) * 2 - 1, size=(4, 4), mode="bilinear")
    optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-2)
    errors = []
    for step in range(80):
        loss, _ = tokenizer.train().loss(images, step, 80, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval()
    errors = [float((x - images).square().mean()) for x in tokenizer.partial_decode(tokenizer.encode(images))]
    assert errors[-1] < 0.6 * float(images.var()), errors
