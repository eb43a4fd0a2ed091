"""Published next-token models become models that decide masks: the same weights, another mask and loss."""

from __future__ import annotations

import json

import pytest
import torch

from seriatim.systems.converted import converted, mask_id
from seriatim.verbs.load import load
from seriatim.verbs.train import train
from support.tiny_chat import write_chat_model

TEXT = "the quick brown fox jumps over the lazy dog\n" * 60


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    write_chat_model(place)
    return place


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts") / "texts.txt"
    place.write_text(TEXT)
    return place


SHORT = {"steps": 2, "batch": 2, "length": 16}


def test_blocks_of_one_say_what_the_next_token_model_says_behind_the_mask(base):
    """Values see values as before: what is cached of a text is the base's, so nothing but the mask is new."""
    model = load(base)
    blocks = converted(model, 1)
    for name, x in model.model.state_dict().items():
        assert torch.equal(x, blocks.model.state_dict()[name]), name
    table = model.model.embed.table
    assert torch.equal(blocks.model.embed.mask, table[blocks.config.mask])


@pytest.mark.parametrize(("key", "block"), [("sdar", 4), ("mdlm", None)])
def test_what_was_trained_is_read_again_from_its_config(base, texts, tmp_path, key, block):
    trained = train(key, texts, out=tmp_path / "run", from_=base, settings=SHORT)
    again = load(tmp_path / "run")
    assert again.config.block == block == json.loads((tmp_path / "run/config.json").read_text())["seriatim"]["block"]
    before, after = trained.system.model.state_dict(), again.model.state_dict()
    for name in ("embed.table", "heads.token.weight"):  # the row that a mask has in a file is met by no text
        before[name][again.config.mask] = after[name][again.config.mask]
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not torch.equal(after["embed.table"], load(base).model.state_dict()["embed.table"])
    text = "".join(again.stream("the quick", 12))
    assert text == "".join(trained.system.stream("the quick", 12))
    assert 0 < again.bound(again.tokenizer.encode("the quick brown"), 1, draws=8) < 1000


def test_an_adapter_is_learned_and_folded_in_on_the_model_that_decides_masks(base, texts, tmp_path):
    trained = train("sdar", texts, out=tmp_path / "run", from_=base, lora=2, settings=SHORT | {"learning_rate": 0.05})
    again = load(tmp_path / "run")
    assert again.config.block == 4
    ids = torch.tensor([again.tokenizer.encode("the quick brown fox")])
    hidden = torch.zeros_like(ids).bool()
    hidden[0, -2:] = True
    theirs = trained.system.logits(ids, hidden)
    torch.testing.assert_close(again.logits(ids, hidden), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, converted(load(base), 4).logits(ids, hidden), atol=1e-3)


def test_options_are_blocks_and_a_mask(base, texts, tmp_path):
    trained = train("sdar", texts, out=tmp_path / "run", from_=base, settings={**SHORT, "block": 8, "mask": 5})
    assert (trained.system.config.block, trained.system.config.mask) == (8, 5)
    assert load(tmp_path / "run").model.factorization.size == 8


@pytest.mark.parametrize(("mask", "message"), [("nothing", "no token 'nothing'"), (10**6, "and there are")])
def test_a_mask_that_does_not_exist_is_refused(base, mask, message):
    with pytest.raises(ValueError, match=message):
        mask_id(load(base), mask)


def test_mistakes_are_named(base, texts, tmp_path):
    model = load(base)
    with pytest.raises(ValueError, match="a block holds"):
        converted(model, 0)
    with pytest.raises(ValueError, match="no next-token model"):
        converted(converted(model, 4), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blok"):
        train("sdar", texts, out=tmp_path / "a", from_=base, settings={"blok": 4})
    said = json.loads((base / "config.json").read_text())
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in base.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    (wrong / "config.json").write_text(json.dumps(said | {"seriatim": {"mask": "x"}}))
    with pytest.raises(ValueError, match="which id is the mask"):
        load(wrong)
