"""Models that write block after block, or in any order, in one batch: each row as it would be alone."""

from __future__ import annotations

import random as stdlib
from types import MappingProxyType

import pytest
import torch

from seriatim.laws.case import randomise
from seriatim.serving.batch import way_of
from seriatim.serving.engine import Engine
from seriatim.serving.request import Request
from seriatim.systems.system import Sampling
from seriatim.systems.text import fast_dllm_v2, mdlm, sdar
from seriatim.tokenizers.text import ByteTokenizer
from support.heard import Heard

VOCAB = 13


class Ending(ByteTokenizer):
    """Ids of which one ends a text."""

    vocab = VOCAB
    special = MappingProxyType({"eos": 5})


def made(module, cls, **changes):
    torch.manual_seed(0)
    config = module.Config(vocab=VOCAB, width=16, depth=2, heads=2, length=96, **changes)
    system = cls(config, Ending()).eval().requires_grad_(False)
    randomise(system.model, std=0.5)
    system.model.float()
    return system


SYSTEMS = {
    "blocks of 4": lambda: made(sdar, sdar.SDAR, block=4, threshold=0.2),
    "blocks of 3": lambda: made(sdar, sdar.SDAR, block=3, threshold=0.9),
    "any order": lambda: made(mdlm, mdlm.MDLM),
}
DECODERS = {"blocks of 4": "own", "blocks of 3": "own", "any order": "unmask+threshold=0.2"}


def alone(system, request, decoder):
    """The ids that a request gets by itself, its end among them, and whether it ended so."""
    canvas, s = system.begun(request.prompt, request.max_new_tokens), request.sampling
    for _ in system._decoded(canvas, way_of(system, decoder), s, request.seed, None, None):
        pass
    ids = canvas.value["token"][0, len(request.prompt) : int(canvas.lengths())].tolist()
    end = ids.index(5) + 1 if 5 in ids else len(ids)
    return ids[:end]


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("seed", range(3))
def test_each_row_is_written_as_alone(kind, seed):
    system, decoder, rng, heard = SYSTEMS[kind](), DECODERS[kind], stdlib.Random(seed), Heard()
    engine = Engine(system, (decoder,), heard, rows=3)
    requests = [
        Request(
            tuple(rng.choice([0, 1, 2, 3, 4, 6, 7]) for _ in range(rng.randint(1, 20))), rng.randint(1, 20),
            Sampling(temperature=rng.choice([0.0, 0.8])), rng.randrange(100),
        )
        for _ in range(7)
    ]  # fmt: skip
    numbers = {}
    while requests or engine.busy:
        if requests and rng.random() < 0.5:
            request = requests.pop()
            numbers[engine.submit(request)] = request
        engine.turn()
    assert all(error is None for _, error in heard.ends.values()), heard.ends
    for number, request in numbers.items():
        want = alone(system, request, decoder)
        assert heard.ids[number] == want
        assert heard.ends[number][0] == ("stop" if want[-1:] == [5] else "length")


def test_rows_at_work_on_different_blocks_go_on_together():
    """A row that joins holds nobody up: a step of the batch is a step of each row."""
    system, heard = SYSTEMS["blocks of 4"](), Heard()
    engine = Engine(system, ("own",), heard)
    first = engine.submit(Request((1, 2), 40, Sampling(temperature=0.0)))
    engine.turn()
    for _ in range(6):
        engine.turn()
    late = engine.submit(Request((3, 4, 6, 7, 1), 20, Sampling(temperature=0.0)))
    while engine.busy:
        engine.turn()
    turns = {n: sum(n in step for step in heard.order) for n in (first, late)}
    assert turns[late] and turns[first] and engine.counts["steps"] < 40 + 20


def test_prompts_are_read_block_by_block():
    system = SYSTEMS["blocks of 4"]()
    order = system.model.factorization
    canvas = system.begun([1] * 14, 8)
    sizes, cached = [], 0
    while (plan := order.fill(canvas, cached, 9)) is not None:
        sizes.append(plan.size)
        cached += plan.size
    assert sizes == [8, 4] and cached == 12, "the rest stands in the block at work"
    assert order.fill(canvas, 0, 1).size == 4


def test_what_cannot_be_is_refused():
    system = SYSTEMS["blocks of 4"]()
    engine = Engine(system, ("own",), Heard())
    with pytest.raises(ValueError, match="those of next-token models"):
        engine.submit(Request((1,), 4, logprobs=0))
    shifted = made(fast_dllm_v2, fast_dllm_v2.FastDLLMv2, block=8)
    with pytest.raises(ValueError, match="they cannot join"):
        Engine(shifted, ("own",), Heard())
