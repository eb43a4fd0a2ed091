"""The sequential tokenizer of D-AR: groups and their slices of time, streaming, and the solver."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from seriatim.tokenizers.sequential import (
    Drawing,
    SequentialConfig,
    SequentialTokenizer,
    Stream,
    adams_bashforth,
)

SIZES = {"side": 8, "vocab": 8, "dim": 4, "queries": 8, "groups": 4, "width": 16, "heads": 2}
SIZES |= {"depth": 1, "read_depth": 1, "flow_depth": 2, "rank": 2, "warm_up": 0.0}


def tokenizer(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    made = SequentialTokenizer(SequentialConfig(**SIZES | changes)).to(dtype).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, dtype=dtype) * 0.3)
    return made


def pictures(n=3, dtype=torch.float64):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_a_time_is_told_the_group_nearest_to_it_and_the_last_one_at_the_end():
    """Trap: rounding, not flooring: group g is trained half a slice to both sides of g / groups."""
    t = tokenizer()
    share = torch.tensor([0.0, 0.124, 0.126, 0.374, 0.376, 0.624, 0.626, 0.874, 0.876, 0.999])
    assert t.group_at(share).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]


def test_time_is_shifted_towards_noise_and_keeps_its_ends():
    share = torch.linspace(0, 1, 9)
    assert torch.allclose(tokenizer().time(share), share / (2 - share))


def test_condition_vectors_of_a_group_depend_on_its_codes_and_those_before():
    t = tokenizer()
    codes = F.normalize(torch.randn(1, 8, 4, dtype=torch.float64), dim=-1)
    felt = torch.autograd.functional.jacobian(lambda z: t.conditions(z)[0].sum(1), codes)[:, 0].abs().sum(2) > 1e-12
    assert torch.equal(felt, torch.ones(8, 8, dtype=torch.bool).tril())


def test_the_velocity_ignores_other_groups(monkeypatch):
    """In training: what the flow is told at a time are the vectors of its group alone."""
    t, told = tokenizer().train(), []
    forward = t.decoder.forward
    monkeypatch.setattr(t.decoder, "forward", lambda x, time, c: told.append((time, c)) or forward(x, time, c))
    images, g = pictures(6), torch.Generator().manual_seed(3)
    t.loss(images, 5, 10, g)
    share = torch.rand(6, generator=torch.Generator().manual_seed(3)).double()
    (time, c) = told[0]
    assert torch.allclose(time, t.time(share))
    whole = t.conditions(t.quantizer.quantize(t.latents(images)).z_q)
    for row, group in enumerate(t.group_at(share).tolist()):
        torch.testing.assert_close(c[row], whole[row, 2 * group : 2 * group + 2])


def test_ids_behind_the_slice_get_no_gradient(monkeypatch):
    t, images = tokenizer().train(), pictures(1)
    for seed in range(6):
        share = torch.rand(1, generator=torch.Generator().manual_seed(seed))
        end, kept = 2 * int(t.group_at(share)) + 2, []
        encode = t.encoder.forward
        with monkeypatch.context() as m:
            m.setattr(t.encoder, "forward", lambda x, f=encode, k=kept: k.append(f(x).requires_grad_()) or k[0])
            loss = t.loss(images, 5, 10, torch.Generator().manual_seed(seed))[0]
        (grad,) = torch.autograd.grad(loss, kept[0])
        live = grad[0].abs().amax(1) > 0
        assert live[:end].all() and not live[end:].any()


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_streaming_is_decoding_after_all_ids_bit_for_bit(dtype):
    t = tokenizer(dtype)
    ids = torch.randint(8, (3, 8), generator=torch.Generator().manual_seed(2))
    stream = Stream(t, 3)
    for part in ids.split(2, 1):
        stream.push(part)
    assert torch.equal(stream.picture, t.decode(ids))


def test_a_preview_depends_on_the_groups_so_far_only():
    t = tokenizer()
    ids = torch.randint(8, (2, 8), generator=torch.Generator().manual_seed(2))
    shown = t.previews(ids)
    assert len(shown) == 4
    for group in range(1, 4):
        other = ids.clone()
        other[:, 2 * group :] = (other[:, 2 * group :] + 3) % 8
        changed = t.previews(other)
        assert all(torch.equal(a, b) for a, b in zip(shown[:group], changed[:group], strict=True))
        assert not torch.equal(shown[group], changed[group])
        assert all(torch.equal(a, b) for a, b in zip(t.previews(ids[:, : 2 * group]), shown, strict=False))


def test_the_last_preview_is_the_picture_where_both_go_by_the_same_velocity(monkeypatch):
    import seriatim.tokenizers.sequential as module

    t = tokenizer()
    told = t.conditions(t.latents(pictures(2)))
    monkeypatch.setattr(module, "adams_bashforth", lambda now, before: now)
    drawing = Drawing(t, 2)
    for part in told.split(2, 1):
        preview = drawing.go_on(part)
    torch.testing.assert_close(preview, drawing.picture, rtol=0, atol=1e-12)


def test_one_group_is_an_ordinary_conditional_flow_autoencoder():
    t = tokenizer(groups=1)
    share = torch.rand(50)
    assert not t.group_at(share).any(), "all times are told all codes"
    told = t.conditions(t.latents(pictures(2)))
    drawing = Drawing(t, 2)
    preview = drawing.go_on(told)
    velocity = t.decoder(t.noise.expand(2, -1, -1, -1), torch.zeros(2, dtype=torch.float64), told)
    want = (t.noise + velocity) / 0.6
    torch.testing.assert_close(preview, want)
    torch.testing.assert_close(drawing.picture, want)


def test_own_noise_is_where_a_picture_begins_and_wrong_noise_is_refused():
    t, ids = tokenizer(), torch.zeros(2, 8, dtype=torch.long)
    other = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert not torch.equal(t.decode(ids, other), t.decode(ids))
    assert torch.equal(t.decode(ids, t.noise.expand(2, -1, -1, -1)), t.decode(ids))
    with pytest.raises(ValueError, match="noise of 2 pictures"):
        t.decode(ids, other[:1])


# ---- the solver ------------------------------------------------------------------------------------------------------


def integrated(velocity, steps):
    x, before = torch.ones((), dtype=torch.float64), None
    for _ in range(steps):
        now = velocity(x)
        x, before = x + adams_bashforth(now, before) / steps, now
    return float(x)


def test_two_step_method_is_eulers_where_the_velocity_is_constant():
    assert integrated(lambda x: torch.tensor(0.7, dtype=torch.float64), 5) == pytest.approx(1.7, abs=1e-14)


def test_its_error_is_of_second_order_on_a_linear_equation():
    error = [abs(integrated(lambda x: -x, n) - math.exp(-1)) for n in (20, 40, 80)]
    assert 3.6 < error[0] / error[1] < 4.4 and 3.8 < error[1] / error[2] < 4.2
    euler = [abs((1 - 1 / n) ** n - math.exp(-1)) for n in (20, 40)]
    assert euler[0] / euler[1] < 2.2


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 9}, "9 ids cannot be cut into 4 equal groups"),
        ({"patch": 3}, "do not tile a side of 8"),
        ({"flow_patch": 5}, "flow_patch"),
        ({"width": 20}, "multiple of 4"),
        ({"deviation": 0.0}, "positive"),
        ({"depth": 0}, "depth is at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SequentialConfig(**SIZES | settings)


def test_settings_follow_the_size_of_pictures():
    assert SequentialConfig.for_pictures(32, 1) == SequentialConfig()
    assert SequentialConfig.for_pictures(8, 1).patch == 1
    photos = SequentialConfig.for_pictures(256, 3)
    assert (photos.queries, photos.size, photos.vocab, photos.patch, photos.flow_patch) == (256, 32, 16384, 16, 8)
    with pytest.raises(ValueError, match="multiple of 8"):
        SequentialConfig.for_pictures(30, 1)
