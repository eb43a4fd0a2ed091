"""Quantizers of single vectors: the law of the round trip for all, and each one by its own definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.tokenizers import library
from seriatim.tokenizers.quantizers import (
    BSQ,
    IBQ,
    VQ,
    NormalizedVQ,
    Quantized,
    Quantizer,
    StraightThrough,
    entropy_penalty,
    usage,
)

package = pytest.importorskip("vector_quantize_pytorch")

OWN = {
    "vq": lambda: VQ(11, 4),
    "vq-l2": lambda: NormalizedVQ(11, 4),
    "ibq": lambda: IBQ(11, 4),
    "bsq": lambda: BSQ(5),
    "bsq of 40 bits": lambda: BSQ(40),
}
WRAPPED = {
    "fsq": lambda: library.FSQ((8, 6, 5)),
    "fsq, even levels": lambda: library.FSQ((4, 4)),
    "lfq": lambda: library.LFQ(5),
    "sim-vq": lambda: library.SimVQ(11, 4),
    "residual-vq": lambda: library.ResidualVQ(11, 4, 3),
    "residual-vq, one level": lambda: library.ResidualVQ(11, 4, 1),
}
ALL = OWN | WRAPPED


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    quantizer = ALL[name]()
    with torch.no_grad():
        for p in quantizer.parameters():  # a default could hide a missing normalisation
            p.copy_(torch.randn(p.shape) * 0.9)
    return quantizer


def latents(quantizer: Quantizer, seed: int = 1) -> Tensor:
    return torch.randn(3, 7, quantizer.code_dim, generator=torch.Generator().manual_seed(seed))


def law(quantizer: nn.Module) -> bool:
    """In eval mode, decode_ids(quantize(z).ids) equals quantize(z).z_q bit for bit."""
    quantizer.eval()
    out = quantizer.quantize(latents(quantizer))  # type: ignore[operator, arg-type]
    return torch.equal(quantizer.decode_ids(out.ids), out.z_q)  # type: ignore[operator]


# ---- the law ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALL)
def test_ids_decode_to_what_the_decoder_was_trained_on(name: str) -> None:
    quantizer = made(name)
    quantizer.train()
    quantizer.quantize(latents(quantizer, 3))  # codebooks that move in training have moved
    assert law(quantizer)


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_range_of_ids(name: str) -> None:
    quantizer = made(name).eval()
    out = quantizer.quantize(latents(quantizer))
    depth = (quantizer.depth,) if quantizer.depth > 1 else ()
    assert out.ids.shape == (3, 7, *depth) and out.ids.dtype == torch.int64
    assert out.z_q.shape == (3, 7, quantizer.code_dim)
    assert out.ids.min() >= 0 and out.ids.max() < quantizer.vocab
    assert out.stats["used"] == out.ids.unique().numel()
    with pytest.raises(ValueError, match="latents are"):
        quantizer.quantize(latents(quantizer)[..., :-1])


@pytest.mark.parametrize("name", ALL)
def test_a_vector_is_quantized_the_same_in_any_company_and_under_autocast(name: str) -> None:
    quantizer = made(name).eval()
    z = latents(quantizer)
    ids = quantizer.quantize(z).ids
    assert torch.equal(quantizer.quantize(z[1:2, 2:5]).ids, ids[1:2, 2:5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.quantize(z).ids, ids)


class RoundsOff(VQ):
    """The usual straight-through sum, whose value is not the codeword."""

    def quantize(self, z: Tensor) -> Quantized:
        out = super().quantize(z)
        return out._replace(z_q=z + (out.z_q - z).detach())


class Unnormalised(NormalizedVQ):
    """Forgets to normalise the codeword on the way back."""

    def decode_ids(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table)

    def quantize(self, z: Tensor) -> Quantized:
        out = super().quantize(z)
        return out._replace(z_q=F.normalize(out.z_q, dim=-1))


class Bridged(nn.Module):
    """The package's quantizer with a bridge, whose codes from ids are those of the table before the bridge."""

    code_dim, vocab, depth = 4, 9, 1

    def __init__(self) -> None:
        super().__init__()
        self.inner = package.VectorQuantize(dim=4, codebook_size=9, vq_bridge=nn.Linear(4, 4), rotation_trick=False)

    def quantize(self, z: Tensor) -> Quantized:
        z_q, ids, loss = self.inner(z)
        return Quantized(z_q, ids, loss.sum(), {})

    def decode_ids(self, ids: Tensor) -> Tensor:
        return self.inner.get_output_from_indices(ids)


@pytest.mark.parametrize("wrong", [lambda: RoundsOff(11, 4), lambda: Unnormalised(11, 4), Bridged])
def test_the_law_catches_wrong_quantizers(wrong) -> None:
    torch.manual_seed(0)
    assert not law(wrong())


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_say_what_the_package_computed(name: str) -> None:
    quantizer = made(name).eval()
    z = latents(quantizer)
    value, ids, _ = quantizer._run(z)
    out = quantizer.quantize(z)
    torch.testing.assert_close(out.z_q, value, atol=1e-6, rtol=1e-5)
    assert torch.equal(out.ids, ids.long())


# ---- gradients -------------------------------------------------------------------------------------------------------
def gradient_is_straight_through(quantizer: nn.Module, run) -> bool:
    """Does the gradient at z equal that at z_q?"""
    z = latents(quantizer).requires_grad_()  # type: ignore[arg-type]
    pull = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    (run(z) * pull).sum().backward()
    assert z.grad is not None
    return torch.allclose(z.grad, pull, atol=1e-5)


@pytest.mark.parametrize("name", ["vq", "lfq", "sim-vq", "residual-vq"])
def test_gradients_go_straight_through(name: str) -> None:
    quantizer = made(name).train()
    if name == "residual-vq":
        quantizer.quantize(latents(quantizer))  # its codebooks are filled at first sight
    assert gradient_is_straight_through(quantizer, lambda z: quantizer.quantize(z).z_q)


def test_the_packages_own_gradients_are_not_straight_through() -> None:
    """The rotation trick by default; and without it a residual quantizer of three levels gives three times as much."""
    torch.manual_seed(0)
    rotating = package.SimVQ(dim=4, codebook_size=11)
    thrice = package.ResidualVQ(dim=4, num_quantizers=3, codebook_size=11, rotation_trick=False)
    for default in (rotating, thrice):
        default.code_dim = 4
        assert not gradient_is_straight_through(default, lambda z, default=default: default(z)[0])


def test_a_residual_codebook_moves_slowly() -> None:
    """Decay .99: a codeword that is all used at one place moves a hundredth of the way; the package's .8 a fifth."""
    torch.manual_seed(0)
    ours = library.ResidualVQ(1, 4, 1).train()
    theirs = package.ResidualVQ(dim=4, num_quantizers=1, codebook_size=1, rotation_trick=False).train()
    moved = []
    for inner in (ours.inner, theirs):
        table = inner.layers[0]._codebook
        table.initted.fill_(True)
        table.embed.zero_(), table.embed_avg.zero_(), table.cluster_size.fill_(100.0)
        inner(torch.ones(1, 100, 4))
        moved.append(table.embed.mean().item())
    assert moved[0] == pytest.approx(0.01, rel=1e-3)
    assert moved[1] == pytest.approx(0.2, rel=1e-3)


# ---- definitions -----------------------------------------------------------------------------------------------------
def test_vq_takes_the_nearest_codeword_and_its_loss_is_the_papers() -> None:
    vq = made("vq")
    z = latents(vq)
    out = vq.quantize(z)
    for row, got in zip(z.flatten(0, 1), out.ids.flatten(), strict=True):
        assert min(range(11), key=lambda k: (row - vq.table[k]).square().sum().item()) == got
    error = (z - vq.table[out.ids]).square().mean()
    torch.testing.assert_close(out.loss, 1.25 * error)
    moved = z.clone().requires_grad_()
    loss = vq.quantize(moved).loss
    loss.backward()
    torch.testing.assert_close(moved.grad, 0.25 * 2 * (z - vq.table[out.ids]).detach() / z.numel())


def test_normalized_vq_lives_on_the_sphere() -> None:
    vq = made("vq-l2")
    z = latents(vq)
    out = vq.quantize(z)
    torch.testing.assert_close(out.z_q.norm(dim=-1), torch.ones(3, 7))
    cosines = F.cosine_similarity(z[:, :, None], vq.table, dim=-1)
    assert torch.equal(out.ids, cosines.argmax(-1))
    assert torch.equal(vq.quantize(3.7 * z).ids, out.ids)
    dots = (z @ vq.table.T).argmax(-1)
    assert not torch.equal(dots, out.ids), "lengths of codewords would have mattered: the test would see no difference"


def test_every_code_gets_a_gradient_by_index_backpropagation_only() -> None:
    def reached(quantizer: nn.Module) -> int:
        out = quantizer.quantize(latents(quantizer))  # type: ignore[operator, arg-type]
        out.z_q.square().sum().backward()
        grad = quantizer.get_parameter("table").grad
        return 0 if grad is None else int((grad.abs().sum(1) > 0).sum())

    ibq, vq = made("ibq"), made("vq")
    assert ibq.quantize(latents(ibq)).ids.unique().numel() < 11
    assert reached(ibq) == 11
    assert reached(vq) == 0, "the codebook of plain VQ learns from its own loss"


def test_ibq_is_a_hard_choice_by_inner_product_with_a_soft_gradient() -> None:
    ibq = made("ibq").double()
    z = latents(ibq).double().requires_grad_()
    out = ibq.quantize(z)
    assert torch.equal(out.ids, (z @ ibq.table.T).argmax(-1))
    pull = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad((out.z_q * pull).sum(), (z, ibq.table))
    p = (z @ ibq.table.T).softmax(-1)
    choice = F.one_hot(out.ids, 11) + p - p.detach()  # the formula as published
    want = torch.autograd.grad((choice @ ibq.table * pull).sum(), (z, ibq.table))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["bsq", "lfq"])
def test_the_first_bit_is_the_most_significant_and_zero_is_negative(name: str) -> None:
    quantizer = made(name).eval()
    z = torch.tensor([[[3.0, -1, -1, -1, -1], [-1, -1, -1, -1, 2], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]])
    assert quantizer.quantize(z).ids.tolist() == [[16, 1, 1, 31]]
    assert (quantizer.decode_ids(torch.tensor([[16]])) > 0).tolist() == [[[True, False, False, False, False]]]


def test_bsq_codes_are_corners_on_the_unit_sphere() -> None:
    bsq = BSQ(40)
    out = bsq.quantize(latents(bsq))
    torch.testing.assert_close(out.z_q.abs(), torch.full((3, 7, 40), 40**-0.5))
    assert out.ids.max() > 2**31, "ids need 64 bits"


def test_the_factorised_entropy_is_that_over_all_codes() -> None:
    """Per vector it equals the sum over all 2^bits codes, as the package has it; of the mean it is an upper bound."""
    torch.manual_seed(0)
    bits = 6
    bsq = BSQ(bits, sharpness=3.0).double()
    u = F.normalize(torch.randn(3, 7, bits, dtype=torch.float64), dim=-1)
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=torch.float64) / math.sqrt(bits)
    p = (2 * 3.0 * u @ codes.T).softmax(-1)
    each, mean = bsq.entropies(u)
    torch.testing.assert_close(each, torch.special.entr(p).sum(-1).mean())
    whole = torch.special.entr(p.flatten(0, 1).mean(0)).sum()
    assert whole < mean < bits * math.log(2)
    lfq = package.LFQ(dim=bits, codebook_size=2**bits, spherical=True).train()
    _, parts = lfq(u.float(), inv_temperature=3.0, return_loss_breakdown=True)
    torch.testing.assert_close(parts.per_sample_entropy, each.float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(parts.batch_entropy, whole.float(), atol=1e-3, rtol=1e-3)


def test_entropy_gradients_are_finite_where_choices_are_sure() -> None:
    for quantizer in (
        BSQ(5, entropy=1.0),
        VQ(11, 4, entropy=1.0),
        NormalizedVQ(11, 4, entropy=1.0),
        IBQ(11, 4, entropy=1.0),
    ):
        z = (100 * latents(quantizer)).requires_grad_()
        quantizer.quantize(z).loss.backward()
        assert z.grad is not None and z.grad.isfinite().all()


def test_the_entropy_penalty_rewards_sure_choices_of_all_codes() -> None:
    even, sure = torch.zeros(1, 8, 8), 9.0 * torch.eye(8)[None]
    one = torch.zeros(1, 8, 8)
    one[..., 0] = 9.0
    assert entropy_penalty(sure, 1.0) < entropy_penalty(even, 1.0) - 1
    assert entropy_penalty(one, 1.0) == pytest.approx(0.0, abs=1e-5)
    assert entropy_penalty(even, 1.0) == pytest.approx(0.0, abs=1e-5)


def test_all_ids_of_fsq_are_met_once() -> None:
    fsq = library.FSQ((8, 8, 8, 5, 5, 5))
    ids = torch.arange(fsq.vocab)[None]
    codes = fsq.decode_ids(ids)
    assert codes[0].unique(dim=0).shape == (64_000, 6)
    assert torch.equal(fsq.inner.codes_to_indices(codes).long(), ids)


def test_a_dropped_level_decodes_as_zero_so_prefixes_decode() -> None:
    rvq = made("residual-vq").train()
    z = latents(rvq)
    rvq.quantize(z)
    rvq.eval()
    ids = rvq.quantize(z).ids
    tables = [layer._codebook.embed[0] for layer in rvq.inner.layers]
    known = torch.zeros_like(z)
    for level in range(3):
        known = known + tables[level][ids[..., level]]
        dropped = ids.clone()
        dropped[..., level + 1 :] = -1
        torch.testing.assert_close(rvq.decode_ids(dropped), known)
        torch.testing.assert_close(rvq.decode_ids(ids[..., : level + 1]), known)
    zeroed = torch.where(dropped < 3, 0, ids)  # another wrong reading: id 0 for a dropped level
    assert not torch.allclose(rvq.decode_ids(zeroed), known)


def test_sim_vq_moves_every_code_and_keeps_its_table() -> None:
    sim = made("sim-vq")
    table, before = sim.inner.frozen_codebook.clone(), sim.inner.codebook.detach().clone()
    optimizer = torch.optim.SGD(sim.parameters(), lr=1.0)
    sim.quantize(latents(sim)).loss.backward()
    optimizer.step()
    assert torch.equal(sim.inner.frozen_codebook, table)
    assert ((sim.inner.codebook - before).abs().sum(1) > 0).all()


def test_usage_counts_codes_not_ids() -> None:
    said = usage(torch.tensor([[0, 0, 5, 5], [5, 5, -1, -1]]))
    assert said["used"] == 2
    share = torch.tensor([2 / 6, 4 / 6])
    torch.testing.assert_close(said["perplexity"], (-(share * share.log()).sum()).exp())


def test_straight_through_is_exact_in_value() -> None:
    value, carrier = torch.tensor([0.1]), torch.tensor([3e7], requires_grad=True)
    out = StraightThrough.apply(value, carrier)
    out.backward(torch.tensor([2.0]))
    assert torch.equal(out, value) and carrier.grad == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: library.LFQ(19), "BSQ takes 62"),
        (lambda: BSQ(63), "1 to 62"),
        (lambda: library.FSQ((2, 8)), "at least 3"),
        (lambda: library.ResidualVQ(8, 4, 0), "at least 1 level"),
        (lambda: VQ(0, 4), "at least 1 code"),
    ],
)
def test_impossible_quantizers_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
