"""The tokenizer of maps of any size: each map codes the whole picture, whatever other maps there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seriatim.maps import area_down
from seriatim.tokenizers import FlexConfig, FlexTokenizer
from seriatim.tokenizers.conv import ResidualEncoder, map_to_rows
from seriatim.tokenizers.multiscale import SCALES


def tokenizer(**changes) -> FlexTokenizer:
    torch.manual_seed(0)
    settings = {"side": 16, "scales": (1, 2, 3, 4), "vocab": 32, "dim": 4, "width": 8, **changes}
    made = FlexTokenizer(FlexConfig(**settings)).eval()
    for p in made.encoder.parameters():  # fresh ones give all pictures the same code
        p.data = torch.randn(p.shape) * (0.4 if p.dim() > 1 else 0.0)
    return made


def pictures(n=6, height=16, width=16, seed=0):
    return torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_map_does_not_depend_on_the_others():
    t, x = tokenizer(), pictures()
    alone = t.encode(x, [(3, 3)])
    assert torch.equal(t.encode(x)[:, 5:14], alone)
    assert torch.equal(t.encode(x, [(1, 1), (3, 3), (2, 4)])[:, 1:10], alone)
    assert alone.unique().numel() > 3


class Constant(nn.Module):
    """The same vector everywhere."""

    def forward(self, images):
        return torch.linspace(-1, 2, 4)[None, :, None, None].expand(len(images), -1, 4, 4)


def test_a_constant_latent_gets_one_code_at_all_scales():
    t = tokenizer()
    t.encoder = Constant()
    assert t.encode(pictures(2)).unique().numel() == 1


def test_the_convolution_to_the_code_may_stand_before_or_behind_the_pooling():
    """The published tokenizer pools before its 1x1 convolution, the published trainer behind it."""
    torch.manual_seed(0)
    encoder = ResidualEncoder(1, 32, 4, (1, 1), blocks=1, inner=8, kernel=1).double()
    inner = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    for shape in ((1, 1), (3, 5), (6, 6)):
        one, other = encoder.to_code(area_down(inner, shape)), area_down(encoder.to_code(inner), shape)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    wide = nn.Conv2d(8, 4, 3, padding=1).double()
    assert (wide(area_down(inner, (3, 3))) - area_down(wide(inner), (3, 3))).abs().max() > 1e-2


def test_codes_and_latents_lie_on_the_unit_sphere():
    t, x = tokenizer(), pictures()
    vectors = t.quantizer.decode_ids(t.encode(x))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(6, 30))
    with torch.no_grad():
        latent = map_to_rows(area_down(t.latent(x), (2, 2)))
        table = torch.nn.functional.normalize(t.quantizer.table, dim=-1)
        nearest = (torch.nn.functional.normalize(latent, dim=-1) @ table.T).argmax(-1)
    assert torch.equal(t.encode(x, [(2, 2)]), nearest)


def test_a_map_alone_is_a_picture_of_its_own_size():
    t = tokenizer()
    ids = t.encode(pictures(), [(2, 2), (3, 4)])
    assert t.decode_map(ids[:, :4], (2, 2)).shape == (6, 1, 8, 8)
    assert torch.equal(t.decode(ids, [(2, 2), (3, 4)]), t.decode_map(ids[:, 4:], (3, 4)))
    assert torch.equal(t.decode(t.encode(pictures())), t.decode_map(t.encode(pictures())[:, -16:], (4, 4)))


def test_pictures_of_other_forms_are_taken_and_drawn():
    t, x = tokenizer(), pictures(2, 12, 24)
    ids = t.encode(x, [(3, 6)])
    assert ids.shape == (2, 18) and t.decode_map(ids, (3, 6)).shape == x.shape
    with pytest.raises(ValueError, match="multiples of 4"):
        t.encode(pictures(2, 12, 22), [(3, 6)])


def test_each_step_draws_the_finest_size_and_others_of_all_sizes():
    t = tokenizer(scales=(1, 2, 4))
    drawn = [t._sizes(torch.Generator().manual_seed(i)) for i in range(40)]
    assert all(sizes[0] == (4, 4) and len(set(sizes)) == 3 for sizes in drawn)
    assert {size for sizes in drawn for size in sizes} == {(n, n) for n in (1, 2, 3, 4)}


def test_each_map_is_compared_with_the_picture_of_its_size():
    """By hand: the mean over sizes of the error of each decoded map and of its codes."""
    t, x = tokenizer(drawn=2, warm_up=0.0, revive_below=0.0).train(), pictures()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        before = t.quantizer.table.clone()
        loss, _ = t.loss(x, 5, 10, generator)
        assert torch.equal(t.quantizer.table, before)
        want = 0
        sizes = t._sizes(torch.Generator().manual_seed(5))
        for shape in sizes:
            said = t.quantizer.quantize(map_to_rows(area_down(t.latent(x), shape)))
            drawn = t.decoder(said.z_q.transpose(1, 2).reshape(6, 4, *shape))
            want = want + (drawn - area_down(x, (4 * shape[0], 4 * shape[1]))).square().mean() + 0.5 * said.loss
    torch.testing.assert_close(loss, want / len(sizes))


@pytest.mark.parametrize("side, scales", [(8, SCALES[8]), (32, SCALES[8]), (64, SCALES[8]), (256, SCALES[16])])
def test_shapes_for_pictures(side, scales):
    config = FlexConfig.for_pictures(side, 3)
    assert config.scales == scales and config.side == side and config.scales[-1] * 2**config.halvings == side


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": (1, 2, 3)}, "the last scale is that of the latent"),
        ({"scales": (2, 2, 4)}, "each larger than the one before"),
        ({"drawn": 5}, "1 to 4 sizes"),
        ({"quantizer": "residual-vq", "depth": 2}, "one id a place"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(**wrong)
    with pytest.raises(ValueError, match="near it there are"):
        FlexConfig.for_pictures(40, 1)
