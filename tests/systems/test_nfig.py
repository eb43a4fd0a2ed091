"""NFIG beyond the laws: VAR's generator over rings (tests/tokenizers/test_rings.py has those)."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from seriatim.random import Generator
from seriatim.systems.image import nfig, var
from seriatim.systems.system import Sampling
from seriatim.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from seriatim.tokenizers.rings import RingConfig, RingTokenizer
from seriatim.verbs.load import load
from seriatim.verbs.train import train

SETTINGS = RingConfig(scales=(1, 2, 4), vocab=8, dim=4, width=8, rings="linear")
DATA = SimpleNamespace(classes=("a", "b"))


def system():
    torch.manual_seed(0)
    c = nfig.Config(SETTINGS, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    made = nfig.NFIG(c, RingTokenizer(SETTINGS).eval()).eval()
    with torch.no_grad():
        for p in made.model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return made


def test_its_config_is_that_of_rings_from_json_too():
    config = nfig.Config(asdict(SETTINGS))
    assert config.tokenizer == SETTINGS and config.tokenizer.quantizer().rings == "linear"


def test_a_scale_is_told_the_sum_of_the_rings_so_far():
    made, g = system(), torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 4, 4, generator=g) * 2 - 1
    vq, embed = made.tokenizer.quantizer, made.model.embed
    with torch.no_grad():
        ids = made.tokenizer.encode(images)
        told = embed.feed(embed.quantizer, ids[:, :5], ((1, 1), (2, 2), (4, 4)), 0, 2)
        steps = list(vq.analyse(made.tokenizer.latents(images)))
        for k, x in enumerate(told):
            side = (2, 4)[k]
            want = torch.nn.functional.interpolate(steps[k].f_hat, size=(side, side), mode="area")
            torch.testing.assert_close(x, want.flatten(2).transpose(1, 2))


def test_a_film_shows_the_rings_so_far():
    made = system()
    out = made.draw(torch.arange(3), sampling=Sampling(guidance=1.5, top_p=0.96), film=True)
    assert out.forwards == 3 and len(out.frames) == 3 and torch.equal(out.frames[-1], out.images)
    assert not torch.equal(out.frames[0], out.frames[1])


def test_it_learns_the_ids_of_its_tokenizer():
    made, g = system().train(), torch.Generator().manual_seed(0)
    batch = {"image": torch.rand(6, 1, 4, 4, generator=g) * 2 - 1, "label": torch.arange(6) % 3}
    optimizer, losses = torch.optim.Adam(made.model.parameters(), 1e-2), []
    for _ in range(30):
        total, count = made.losses(batch, Generator(0), 0.0)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float((total / count).detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_tokenizers_of_another_analysis_are_refused():
    plain = MultiScaleTokenizer(MultiScaleConfig(scales=(1, 2), width=8))
    with pytest.raises(ValueError, match="nfig needs a rings tokenizer: a run of image-rings"):
        nfig.NFIG.known(plain, DATA)
    with pytest.raises(ValueError, match="var needs a multi-scale tokenizer: a run of image-msvq"):
        var.VAR.known(RingTokenizer(SETTINGS), DATA)
    assert nfig.NFIG.known(RingTokenizer(SETTINGS), DATA) == {"tokenizer": SETTINGS, "classes": 2}


@pytest.mark.slow
def test_it_is_trained_and_loaded_with_its_tokenizer(tmp_path):
    made = train("nfig", "digits", out=tmp_path / "run", settings={"steps": 3, "tokenizer_steps": 6})
    again = load(tmp_path / "run")
    assert isinstance(again.tokenizer, RingTokenizer) and again.config == made.system.config
    assert torch.equal(again.draw(torch.arange(2)).images, made.system.draw(torch.arange(2)).images)
