"""Decoders that leave out layers, by name: with a draft of another decoder they write the same, and options that mean
nothing are refused."""

from __future__ import annotations

import pytest
import torch

from seriatim.laws.interface import PROMPTS, small
from seriatim.posttraining.drafting import Base, save_part
from seriatim.posttraining.routers import RouterConfig, Routers
from seriatim.systems.decoders import decoder_of
from seriatim.systems.system import Sampling


@pytest.fixture(scope="module")
def model():
    return small(4)


@pytest.fixture(scope="module")
def specs(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    base, g = Base(model), torch.Generator().manual_seed(0)
    part = Routers(RouterConfig(), base)
    with torch.no_grad():
        for p in part.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    save_part(part, base, folder)
    return {
        "skipdecode": "skipdecode+least=2+length=8",
        "ffn-skipllm": "ffn-skipllm+threshold=0.5+warmup=2",
        "first": f"first:{folder}",
    }


@pytest.mark.parametrize("key", ["skipdecode", "ffn-skipllm", "first"])
@pytest.mark.parametrize("draft", ["prompt-lookup", "jacobi"])
def test_a_draft_leaves_the_texts_as_they_are(model, specs, key, draft):
    """Of a ragged batch, greedy and by the same noise; and they are not those of the plain model."""
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        plain, alone, drafted = (
            model.generate(PROMPTS, spec, max_new_tokens=16, **settings)
            for spec in ("ancestral", specs[key], f"{specs[key]}+draft={draft}")
        )
        assert [g.ids for g in drafted] == [g.ids for g in alone] != [g.ids for g in plain]
        assert all(g.drafted > 0 for g in drafted)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("skipdecode+least=5", "least is at most 4"), ("skipdecode+most=5", "5 layers of 4"),
        ("skipdecode+least=-1", "neither is below 0"), ("skipdecode+length=0", "at least 1 token"),
        ("skipdecode+warmup=3", "the 3 first ones included"), ("skipdecode:zoo", "needs no other model"),
        ("skipdecode+least=half", "is a int"), ("ffn-skipllm+run=0", "at least 1 network"),
        ("ffn-skipllm+bottom=3+top=2", "more than the 4 there are"), ("first", "name the folder"),
        ("skipdecode+draft=ffn-skipllm", "leaves out layers itself"), ("skipdecode+draft=nothing", "no decoder 'noth"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(model, spec, message):
    with pytest.raises(ValueError, match=message):
        model.target(None, Sampling(), **decoder_of(model, spec, Sampling()).target)
