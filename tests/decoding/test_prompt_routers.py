"""Routers in front of layers: a prompt decides for its whole text, by itself, and what it leaves out is gone."""

from __future__ import annotations

import pytest
import torch

from seriatim.decoding.layers import PromptRouters
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.layout import line
from seriatim.plan import OrderError
from seriatim.random import Keyed
from support.skipping import DEPTH, NEW, PROMPTS, layers_called, routers, system, written


@pytest.fixture(scope="module")
def made():
    return system()


@pytest.mark.parametrize("prompt", ["skips", "runs"])
def test_a_decision_stands_for_the_whole_generation(made, prompt, monkeypatch):
    """Routers are asked once a layer, and from then on the same layers are computed at every step."""
    calls, asked, rho = layers_called(made, monkeypatch), [], PromptRouters.rho
    monkeypatch.setattr(PromptRouters, "rho", lambda self, i, *a: asked.append(i) or rho(self, i, *a))
    _, _, target = written(made, PROMPTS[:1], routers(prompt=prompt))
    runs = target.skipping.runs[:, 0].nonzero()[:, 0].tolist()
    assert asked == list(range(DEPTH)) and 0 < len(runs) < DEPTH
    first = runs if prompt == "skips" else list(range(DEPTH))
    assert calls == first + runs * (NEW - 1)


@pytest.mark.parametrize("prompt", ["skips", "runs"])
def test_a_skipped_layer_adds_nothing_and_takes_no_room(made, prompt):
    """What it holds does not matter, and the cache has neither room for it nor entries."""
    plan = routers(prompt=prompt)
    want, _, target = written(made, PROMPTS[:1], plan)
    skipped = (~target.skipping.runs[:, 0]).nonzero()[:, 0].tolist()
    spoilt = system()
    canvas, again = spoilt._begun(PROMPTS[:1], NEW), Target(spoilt.model, layers=plan)
    with torch.inference_mode():
        for n, _ in enumerate(decode(again, canvas, SampleAll(), None, Keyed(3))):
            if n == 0:
                for i in skipped:
                    for p in spoilt.model.backbone.layers[i].parameters():
                        p.fill_(torch.nan)
    assert canvas.value["token"].tolist() == want
    kept = DEPTH - len(skipped)
    assert target.cache.buffer.shape[0] == kept == len(target.cache.layers)
    _, _, whole = written(made, PROMPTS[:1], None)
    assert target.cache.nbytes() * DEPTH == whole.cache.nbytes() * kept


def test_prompts_of_a_batch_decide_by_themselves_or_together(made):
    apart, together = routers(), routers(together=True)
    _, _, target = written(made, PROMPTS, apart)
    single = [written(made, [row], apart)[2].skipping for row in PROMPTS]
    assert torch.equal(target.skipping.runs, torch.cat([s.runs for s in single], 1))
    assert len({tuple(s.runs[:, 0].tolist()) for s in single}) > 1  # they do not all want the same
    same = [PROMPTS[0], PROMPTS[0]]
    _, _, joint = written(made, PROMPTS, together)
    assert bool((joint.skipping.runs == joint.skipping.runs[:, :1]).all())
    assert torch.equal(written(made, same, together)[2].skipping.runs[:, :1], single[0].runs)


def test_the_mean_over_the_prompt_decides(made):
    """rho of the first layer, by hand."""
    plan = routers()
    _, _, target = written(made, PROMPTS[2:3], plan)
    ids = torch.tensor([[*PROMPTS[2], 0]])
    canvas = made.model.canvas({"token": ids}, len(PROMPTS[2]), layout=line(ids.shape[1]))
    with torch.no_grad():
        x = made.model.vectors(made.model.factorization.packed(canvas), canvas)[0]
    unit = x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    want = torch.sigmoid(unit @ plan.weight[0].double() + plan.bias[0]).mean()
    assert float(target.skipping.rho[0, 0]) == pytest.approx(float(want), abs=1e-6)


def test_protected_layers_are_never_skipped(made):
    plan = routers(threshold=1.1, always=frozenset({0, 5}))
    _, _, target = written(made, PROMPTS, plan)
    assert target.skipping.runs.all(1).tolist() == [True, False, False, False, False, True]
    assert target.cache.layers == (0, 5)


def test_a_prompt_of_which_a_part_was_cached_before_is_refused(made):
    canvas, target = made._begun(PROMPTS[2:3], 4), Target(made.model, layers=routers())
    plain = Target(made.model)
    plain.prefill(canvas, 2)
    target.plan(canvas)
    target.cache = plain.cache
    with pytest.raises(OrderError, match="whole prompts"):
        target.plan(canvas)
