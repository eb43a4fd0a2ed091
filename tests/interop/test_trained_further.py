"""Released weights of pictures, trained further and stored by us: what was read comes back, and is what was trained."""

from __future__ import annotations

import pytest
import torch

from seriatim.data.base import Data
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from seriatim.verbs.train import train
from support import released_flexvar, released_llamagen, released_mar, released_var
from support.released_var import released


def llamagen(place):
    torch.save({"model": released(released_llamagen.tokenizer_shapes())}, place / "vq_ds16_c2i.pt")
    torch.save({"model": released_llamagen.sharper(released(released_llamagen.generator_shapes()))}, place / "c2i_B.pt")
    return "raster-ar", place / "c2i_B.pt", Sampling(temperature=0.0)


def mar(place):
    torch.save({"model": released(released_mar.autoencoder_shapes())}, place / "kl16.ckpt")
    torch.save(released_mar.balanced(released(released_mar.generator_shapes())), place / "checkpoint-last.pth")
    return "mar", place / "checkpoint-last.pth", Sampling(steps=2)


def var(place):
    torch.save(released(released_var.tokenizer_shapes()), place / "vae_ch160v4096z32.pth")
    torch.save(released(released_var.generator_shapes(False)), place / "var_d16.pth")
    return "var", place / "var_d16.pth", Sampling(temperature=0.0)


def flexvar(place):
    shapes = released_llamagen.tokenizer_shapes(released_flexvar.DIM)
    torch.save({"model": released(shapes)}, place / "FlexVAE.pth")
    torch.save(released_flexvar.weights(), place / "FlexVARd16-epo179.pth")
    return "flexvar", place / "FlexVARd16-epo179.pth", Sampling(temperature=0.0)


class Noise:
    def __init__(self, side):
        self.side = side

    def __len__(self):
        return 8

    def take(self, index, generator=None):
        images = torch.rand(len(index), 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        return {"image": 2 * images - 1, "label": index % 2}


def noise(side, classes=("cat", "dog")):
    return Data("noise", "image", Noise(side), Noise(side), classes)


@pytest.mark.parametrize("files", [llamagen, mar, var, flexvar])
def test_a_run_that_learned_nothing_is_what_was_released(files, tmp_path):
    """Tokenizer, sizes and weights pass through a run's folder unchanged."""
    key, path, greedy = files(tmp_path)
    system = load(path)
    data, label = noise(system.tokenizer.side), torch.tensor([1])
    out = tmp_path / "run"
    train(key, data, from_=path, out=out, settings={"steps": 1, "batch": 1, "learning_rate": 1e-30, "bf16": False})
    again = load(out)
    assert again.config == system.config and again.classes == ("cat", "dog")
    stored, read = again.weights_to_keep().state_dict(), system.weights_to_keep().state_dict()
    assert stored.keys() == read.keys() and all(torch.allclose(stored[name], x, 0, 1e-25) for name, x in read.items())
    images = [s.draw(label, sampling=greedy, seed=3).images for s in (system, again)]
    assert torch.equal(*images)


def test_what_cannot_be_trained_further_is_refused(tmp_path):
    key, path, _ = llamagen(tmp_path)
    side = load(path).tokenizer.side
    with pytest.raises(ValueError, match=r"say which pictures \(--data\)"):
        train(key, from_=path, out=tmp_path / "run")
    with pytest.raises(ValueError, match=f"say --image-size {side}"):
        train(key, noise(side // 2), from_=path, out=tmp_path / "run")
    with pytest.raises(ValueError, match="knows 5 classes, and noise has 6"):
        train(key, noise(side, tuple("abcdef")), from_=path, out=tmp_path / "run")
    with pytest.raises(ValueError, match="nar begins as a nar model"):
        train("nar", noise(side), from_=path, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"depth is 2 .* cannot be 1"):
        train(key, noise(side), from_=path, out=tmp_path / "run", settings={"depth": 1})


def test_it_learns_more_slowly_than_from_the_beginning(tmp_path):
    """A tenth of the recipe's rate, unless told."""
    train("raster-ar", "digits", out=tmp_path / "first", settings={"steps": 2, "bf16": False})
    rate = load_card(tmp_path / "first")["recipe"]["learning_rate"]
    train(
        "raster-ar",
        from_=tmp_path / "first",
        out=tmp_path / "second",
        settings={"steps": 1, "bf16": False, "dropout": 0.5},
    )
    card = load_card(tmp_path / "second")
    assert card["recipe"]["learning_rate"] == pytest.approx(rate / 10) and card["data"] == "digits"
    assert card["config"]["dropout"] == 0.5


def load_card(folder):
    from seriatim.training.run import RunFolder

    return RunFolder(folder).read_card()
