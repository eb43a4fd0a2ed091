"""D-AR: ids that become pictures on the way, beyond the laws (test_sequential.py has its tokenizer)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from seriatim.random import Generator
from seriatim.systems.image import d_ar
from seriatim.systems.query_trials import previews_settle, spectrum
from seriatim.systems.system import Sampling, config_from
from seriatim.tokenizers import PixelConfig, PixelTokenizer
from seriatim.tokenizers.sequential import SequentialConfig, SequentialTokenizer
from seriatim.verbs.load import load
from seriatim.verbs.train import train

SHAPE = SequentialConfig(
    side=8, vocab=8, dim=4, queries=8, groups=4, width=16, heads=2, depth=1, read_depth=1, flow_depth=1, rank=2
)
DATA = SimpleNamespace(classes=("a", "b", "c"))
SAMPLING = Sampling(guidance=1.5)


def system(**settings):
    torch.manual_seed(0)
    tokenizer = SequentialTokenizer(SHAPE).eval()
    c = d_ar.Config(**d_ar.DAR.known(tokenizer, DATA), width=16, depth=2, heads=2, dropout=0.0, **settings)
    made = d_ar.DAR(c, tokenizer).eval()
    with torch.no_grad():
        for p in (*made.model.parameters(), *tokenizer.parameters()):
            p.copy_(torch.randn(p.shape) * 0.3)
    return made


def test_the_stream_ends_in_the_picture_that_is_drawn_without_it():
    made, labels = system(), torch.arange(3)
    shown = list(made.stream(labels, SAMPLING, seed=4))
    assert len(shown) == 5, "a preview a group, and the picture"
    assert torch.equal(shown[-1], made.draw(labels, sampling=SAMPLING, seed=4).images)
    assert not torch.equal(shown[0], shown[1])


def test_a_group_is_shown_before_the_next_is_generated():
    made, decided = system(), []
    forward = made.model.backbone.forward
    made.model.backbone.forward = lambda *a, **k: decided.append(1) or forward(*a, **k)
    stream = made.stream(torch.arange(2), Sampling())
    for group in range(4):
        next(stream)
        assert len(decided) == 2 * (group + 1)


def test_a_film_shows_previews_and_ends_in_the_picture():
    made = system()
    out = made.draw(torch.arange(2), sampling=SAMPLING, film=True)
    assert out.forwards == 8 and torch.equal(out.frames[-1], out.images)
    assert not out.frames[0].any(), "no group is whole yet"
    assert torch.equal(out.frames[1], out.frames[2]) and not torch.equal(out.frames[2], out.frames[3])


def test_layout_is_taken_over_with_the_first_groups():
    made = system()
    images, labels = torch.rand(2, 1, 8, 8) * 2 - 1, torch.arange(2)
    first = made.tokenizer.previews(made.tokenizer.encode(images))
    given = made.tokenizer.encode(images)[:, :4]
    shown = list(made.stream(labels, SAMPLING, given=given))
    assert torch.equal(shown[0], first[0]) and torch.equal(shown[1], first[1]) and not torch.equal(shown[2], first[2])
    assert torch.equal(made.transfer(images, labels, 2, SAMPLING), shown[-1])
    whole = made.transfer(images, labels, 4, SAMPLING)
    assert torch.equal(whole, made.tokenizer.decode(made.tokenizer.encode(images)))
    with pytest.raises(ValueError, match="0 to 4 groups"):
        made.transfer(images, labels, 5)
    with pytest.raises(ValueError, match="whole groups of 2 ids"):
        next(made.stream(labels, given=given[:, :3]))


def test_shuffled_groups_are_put_back_before_they_are_drawn():
    made, plain = system(shuffled=True), system()
    batch = {"image": torch.rand(3, 1, 8, 8) * 2 - 1, "label": torch.arange(3)}
    ids = made.tokenizer.encode(batch["image"])
    canvas, _ = made.canvas(batch)
    assert not torch.equal(canvas.value["token"], ids)
    moved = canvas.value["token"].view(3, 4, 2)
    assert all(any(torch.equal(moved[:, k], group) for k in range(4)) for group in ids.view(3, 4, 2).unbind(1))
    assert torch.equal(made.finished(canvas), made.tokenizer.decode(ids))
    assert torch.equal(plain.canvas(batch)[0].value["token"], ids)
    with pytest.raises(ValueError, match="another order"):
        next(made.stream(torch.arange(2)))


def test_guidance_grows_linearly_along_the_line():
    assert d_ar.DAR.schedule == "linear" and d_ar.DAR.sampling.top_p is None


def test_it_learns_the_ids_of_its_tokenizer():
    made, g = system().train(), torch.Generator().manual_seed(0)
    batch = {"image": torch.rand(6, 1, 8, 8, generator=g) * 2 - 1, "label": torch.arange(6) % 3}
    optimizer, losses = torch.optim.Adam(made.model.parameters(), 1e-2), []
    for _ in range(30):
        total, count = made.losses(batch, Generator(0), 0.0)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float((total / count).detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_other_tokenizers_and_empty_groups_are_refused():
    with pytest.raises(ValueError, match="d-ar needs a sequential tokenizer: a run of image-sequential"):
        d_ar.DAR.known(PixelTokenizer(PixelConfig()), DATA)
    with pytest.raises(ValueError, match="at least 1 group"):
        d_ar.Config(groups=0)


def test_power_is_sorted_by_periods_a_picture():
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16).expand(1, 1, 16, 16)
    power = spectrum(wave)
    assert int(power.argmax()) == 3 and power[3] > 0.999 * power.sum()


class Four:
    """Four pictures."""

    def __len__(self):
        return 4

    def take(self, index):
        return {"image": torch.rand(len(index), 1, 8, 8) * 2 - 1}


def test_what_settles_is_measured():
    made = system()
    data = SimpleNamespace(test=Four())
    said = previews_settle(SimpleNamespace(model=made.tokenizer), 0, data)
    assert said["of"] == 3 and 0 <= said["falls"] <= 3 and all(said[f"error_{g}"] > 0 for g in (1, 2, 3, 4))
    assert 0 < said["low_by_half"] < 1 and 0 < said["high_by_half"] < 1


def test_a_config_follows_from_the_tokenizer_at_every_size():
    known = d_ar.DAR.known(system().tokenizer, DATA)
    for size in d_ar.DAR.sizes:
        assert config_from(d_ar.DAR, {}, size, **known).group_size == 2


@pytest.mark.slow
def test_it_is_trained_and_loaded_with_its_tokenizer(tmp_path):
    made = train("d-ar", "digits", out=tmp_path / "run", settings={"steps": 3, "tokenizer_steps": 6})
    again = load(tmp_path / "run")
    assert isinstance(again.tokenizer, SequentialTokenizer) and again.config == made.system.config
    assert torch.equal(again.draw(torch.arange(2)).images, made.system.draw(torch.arange(2)).images)


def test_a_part_of_a_picture_is_not_kept_by_ids_of_a_line():
    made = system()
    side = made.tokenizer.side
    with pytest.raises(ValueError, match="no place"):
        made.repaint(torch.zeros(1, 1, side, side), torch.ones(side, side, dtype=torch.bool), torch.tensor([0]))
