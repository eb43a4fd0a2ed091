"""Models and layer plans made for each other: the loss is that of decoding, cosines are those by hand, thresholds do
what is asked of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from seriatim.decoding.layers import Saturation, Staircase, begun
from seriatim.posttraining.lora import LoRA
from seriatim.posttraining.skipping import (
    feedforward_cosines,
    fitted,
    judged,
    prompts_in,
    skipping_loss,
    skipping_losses,
)
from seriatim.random import Generator
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.systems.tuned import Tuned, TunedByLayers, Tuning
from seriatim.training.loop import adamw
from seriatim.training.recipe import Recipe
from seriatim.verbs.finetune import learner_of
from seriatim.verbs.load import load
from seriatim.verbs.train import train
from support.skipping import DEPTH, NEW, PLANS, PROMPTS, VOCAB, system, written

IDS = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made():
    return system()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_loss_of_one_pass_is_that_of_decoding(made, plan):
    """Token by token, in a batch of texts whose prompts have different lengths."""
    texts, laws, _ = written(made, PROMPTS, plan)
    size = max(map(len, texts))
    ids = torch.tensor([text + [0] * (size - len(text)) for text in texts])
    with torch.no_grad():
        losses = skipping_losses(made.model, ids, torch.tensor([len(p) for p in PROMPTS]), begun(plan, made.model))
    for row, prompt in enumerate(PROMPTS):
        said = torch.stack([law[row] for law in laws])
        new = torch.tensor(texts[row][len(prompt) :])
        assert (losses[row, len(prompt) : len(prompt) + NEW] + said.gather(1, new[:, None])[:, 0]).abs().max() < 1e-10
        assert bool((losses[row, : len(prompt)] == 0).all())


def test_prompts_are_drawn_or_end_where_an_answer_begins():
    drawn = torch.cat([prompts_in({"token": IDS}, Generator(seed)) for seed in range(100)])
    assert drawn.unique().tolist() == list(range(1, 12))
    counts = torch.zeros(3, 12, dtype=torch.bool)
    counts[0, 4:6], counts[1, 9:], counts[2, 0] = True, True, True
    assert prompts_in({"token": IDS, "counts": counts}, Generator(0)).tolist() == [4, 9, 1]


def test_answers_alone_count(made):
    counts = torch.zeros(3, 12, dtype=torch.bool)
    counts[:, 5:7], counts[:, 10] = True, True
    plan = PLANS["staircase"]
    total, count = skipping_loss(made.model, {"token": IDS, "counts": counts}, begun(plan, made.model), Generator(0))
    each = skipping_losses(made.model, IDS, torch.full((3,), 5), begun(plan, made.model))
    assert int(count) == 9 and float(total) == pytest.approx(float(each[counts].sum()), abs=1e-10)


def test_gradients_reach_a_layer_from_tokens_that_go_through_it_and_from_no_others():
    """Layer 2 is run by the prompt and by the first token behind it; the last layer by all."""
    model = system().requires_grad_(True).model
    middle, last = model.backbone.layers[2].down, model.backbone.layers[5].down
    for counts, reached in (((6, 6, 3), True), ((3,), False)):
        losses = skipping_losses(model, IDS, torch.full((3,), 4), begun(Staircase(counts), model))
        of_middle, of_last = torch.autograd.grad(losses.sum(), [middle, last], allow_unused=True)
        assert float(of_last.abs().max()) > 1e-6
        assert float(of_middle.abs().max()) > 1e-6 if reached else of_middle is None


# ---- cosines and thresholds ------------------------------------------------------------------------------------------


def by_hand(made, ids: Tensor) -> list[float]:
    """Cosines in front of the first token, where the learned start stands and sees itself alone, so that attention
    hands on its own values."""
    backbone, c = made.model.backbone, made.model.backbone.config
    canvas = made.model.canvas({"token": ids}, 1)
    x = made.model.vectors(made.model.factorization.packed(canvas), canvas)[0, 0]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + c.eps).sqrt() * weight

    found = []
    for layer in backbone.layers:
        value = (layer.qkv @ norm(x, layer.norm1))[(c.heads + c.groups) * c.dim :]
        x = x + layer.out @ value
        gate, up = (layer.up @ norm(x, layer.norm2)).chunk(2)
        y = x + layer.down @ (gate * torch.sigmoid(gate) * up)
        found.append(float(x @ y / (x.norm() * y.norm())))
        x = y
    return found


def test_cosines_are_those_by_hand(made):
    got = feedforward_cosines(made.model, IDS)
    assert got.shape == (DEPTH, 3, 12)
    with torch.no_grad():
        for row in range(3):
            full = torch.nn.functional.pad(IDS[row : row + 1], (0, made.model.layout.size - 12))
            assert got[:, row, 0].tolist() == pytest.approx(by_hand(made, full), abs=1e-9)


def test_looking_at_cosines_changes_nothing(made):
    losses = made.model.losses(made.model.canvas({"token": IDS}, 1, layout=made.canvas({"token": IDS})[0].layout))
    plain = skipping_losses(made.model, IDS, torch.ones(3, dtype=torch.long), begun(Staircase((DEPTH,)), made.model))
    feedforward_cosines(made.model, IDS)
    assert torch.equal(plain, losses)


def test_a_threshold_is_found_for_a_share(made):
    """At least the share that is asked for is computed; a grade lower, and it is less."""
    plan, ids = Saturation(0.0, run=2, bottom=1, top=1, warmup=2), IDS
    shares = []
    grades = feedforward_cosines(made.model, ids).flatten()
    for share in (0.95, 0.9):
        found = fitted(plan, made.model, ids, share, prompt=3)
        got = judged(made.model, ids, 3, found).share
        assert got >= share and replace(found, threshold=plan.threshold) == plan
        below = float(grades[grades < found.threshold].max())
        assert judged(made.model, ids, 3, replace(found, threshold=below)).share < share
        shares.append(got)
    assert shares == sorted(shares, reverse=True)
    assert judged(made.model, ids, 3, fitted(plan, made.model, ids, 1.0, prompt=3)).share == 1


def test_the_share_is_what_decoding_counts(made):
    plan = PLANS["saturation"]
    texts, _, target = written(made, PROMPTS[:1], plan)
    got = judged(made.model, torch.tensor(texts), len(PROMPTS[0]), plan).share
    assert got == pytest.approx(target.skipping.tally.share, abs=1e-12)


def test_shares_that_no_threshold_reaches_are_refused(made):
    with pytest.raises(ValueError, match=r"at every threshold at least 0\.67 of the networks"):
        fitted(Saturation(0.0, run=1, bottom=1, top=1, warmup=0), made.model, IDS, 0.5)
    with pytest.raises(ValueError, match=r"lies in \(0, 1\]"):
        fitted(Saturation(0.0), made.model, IDS, 0.0)


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_under_a_schedule_makes_up_for_it():
    """Of a model that knows two texts by heart, with half of its layers: worse than with all, and as good once it has
    learned to do without."""
    torch.manual_seed(2)
    made = NextToken(Config(length=64, vocab=VOCAB, width=32, depth=4, heads=2), SimpleNamespace(special={}))
    batch = {"token": torch.tensor([[0, 1, 2, 3, 4] * 2, [4, 3, 2, 1, 0] * 2]).repeat(8, 1)}
    full, half = Staircase((4,)), Staircase.linear(4, 2, 3)

    def loss(plan: Staircase, seed: int = 0) -> Tensor:
        total, count = skipping_loss(made.model, batch, begun(plan, made.model), Generator(seed))
        return total / count

    def learn(plan: Staircase) -> None:
        optimizer = adamw(made, Recipe(30, learning_rate=1e-2, weight_decay=0.0))
        for step in range(30):
            optimizer.zero_grad()
            loss(plan, step).backward()
            optimizer.step()

    learn(full)
    assert float(loss(full).detach()) < 0.1 and float(loss(half).detach()) > 0.2
    learn(half)
    assert float(loss(half).detach()) < 0.1


@pytest.mark.parametrize("name", ["staircase", "routers"])
def test_an_adapter_is_trained_with_the_skips_in_place(name):
    """The learner's loss is that of the plan; all of the adapter gets a gradient, but in layers that are left out, and
    nothing else does; folded in, the model has the same loss."""
    plan, random = PLANS[name], torch.Generator().manual_seed(0)
    learner = TunedByLayers(system().float(), plan, LoRA(rank=2))
    named = dict(learner.named_parameters())
    with torch.no_grad():
        for p in named.values():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=random) * 0.1)
    total, count = learner({"token": IDS}, Generator(5), 0, 10)
    total.backward()
    total = total.detach()
    reached = {key for key, p in named.items() if p.grad is not None and bool((p.grad != 0).any())}
    skipping = begun(plan, learner.system.model)
    skipping_loss(learner.system.model, {"token": IDS}, skipping, Generator(5))
    left = [i for i in range(DEPTH) if name == "routers" and not bool(skipping.runs[i].any())]
    trained = {key for key, p in named.items() if p.requires_grad}
    assert trained and reached == {key for key in trained if not any(f"layers.{i}." in key for i in left)}
    folded = skipping_loss(learner.finished().model, {"token": IDS}, begun(plan, learner.system.model), Generator(5))
    assert float(folded[0]) == pytest.approx(float(total), rel=1e-5) and int(folded[1]) == int(count)


def test_a_decoder_that_runs_all_layers_has_nothing_to_learn():
    with pytest.raises(ValueError, match="prompt-lookup runs all layers, so there is nothing to learn"):
        learner_of(system(), Tuning(decoder="prompt-lookup"))
    assert type(learner_of(system(), Tuning())) is Tuned
    assert isinstance(learner_of(system(), Tuning(decoder="skipdecode+least=3")), TunedByLayers)


def test_training_by_name_leaves_a_model_for_the_decoder(tmp_path: Path):
    """A run of our own, trained further by the schedule of a decoder, is loaded and generates by it."""
    text = tmp_path / "text.txt"
    text.write_text("abcd " * 400)
    tiny = {"length": 32, "width": 16, "depth": 4, "heads": 2, "steps": 4, "batch": 2}
    train("next-token", text, out=tmp_path / "base", settings=tiny)
    spec = "skipdecode+least=2+length=8"
    run = train(
        "next-token", text, from_=tmp_path / "base", out=tmp_path / "tuned",
        settings={"steps": 3, "batch": 2, "decoder": spec, "bf16": False},
    )  # fmt: skip
    assert run.history[-1]["held_out_loss"] > 0
    model = load(tmp_path / "tuned")
    assert model.generate("abcd ab", spec, max_new_tokens=12, temperature=0).ids
