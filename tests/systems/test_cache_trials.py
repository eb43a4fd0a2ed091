"""What a cache changes is nothing where it is exact or at its neutral setting, and is found where it is not."""

import pytest

from seriatim.laws.case import randomise
from seriatim.systems import cache_trials
from seriatim.systems.cache_trials import drift
from seriatim.systems.decoders import Decoding
from seriatim.systems.text import mdlm, sdar
from seriatim.tokenizers.text import ByteTokenizer

PROMPTS = [[1, 2, 3, 4], [9, 8, 7, 6]]


def system(module, cls, **shape):
    one = cls(module.Config(length=40, width=16, depth=2, heads=2, **shape), ByteTokenizer())
    randomise(one.model, std=0.3)
    return one.double().eval()


@pytest.fixture(scope="module")
def masked():
    return system(mdlm, mdlm.MDLM, block=None)


@pytest.mark.parametrize(
    "spec", ["fast-dllm+cache=none", "freecache-guided+block=none", "fast-dllm+cache=dual+block=1"]
)
def test_no_cache_and_neutral_settings_change_nothing(masked, spec):
    found = drift(masked, spec + "+threshold=none", PROMPTS, 12)
    assert found["worst"] < 1e-12 and found["agreed"] == 1.0 and found["asked"] > 20


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_around_a_block_change_the_law_and_save_slots(masked, cache):
    found = drift(masked, f"fast-dllm+cache={cache}+block=6+threshold=none", PROMPTS, 12)
    assert found["divergence"] > 1e-6 and found["worst"] > found["divergence"] and found["slots_share"] < 1


def test_the_cache_of_a_model_of_blocks_is_exact():
    blocks = system(sdar, sdar.SDAR, block=4)
    found = drift(blocks, "unmask", PROMPTS, 12)
    assert found["worst"] < 1e-12 and found["slots_share"] < 0.7
    parts = drift(blocks, "fast-dllm+cache=dual+block=2+threshold=none", PROMPTS, 12)
    assert parts["divergence"] > 1e-6


def test_what_drafts_is_refused(masked, monkeypatch):
    monkeypatch.setattr(cache_trials, "decoder_of", lambda *_: Decoding(None, proposer=object()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drafts"):
        drift(masked, "any", PROMPTS, 12)
