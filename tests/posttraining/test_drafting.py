"""Draft parts: their loss is the one of the formula, their base stays as it is and is known again, and a training that
is cut off goes on as if it had not been."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from seriatim.backbones.quantize import packs, quantize
from seriatim.laws.case import randomise
from seriatim.posttraining import drafting
from seriatim.posttraining.drafting import Base, DraftLearner, load_part, losses_ahead, save_part
from seriatim.posttraining.heads import Hydra, HydraConfig, Medusa, MedusaConfig
from seriatim.posttraining.states import states_of, windows
from seriatim.random import Generator
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder, read_lines
from seriatim.training.trainer import train

torch.set_num_threads(1)
VOCAB, WIDTH = 24, 32


def system(seed: int = 0, softcap: float | None = None) -> NextToken:
    made = NextToken(Config(length=64, vocab=VOCAB, width=WIDTH, depth=2, heads=2), SimpleNamespace(special={}))
    randomise(made.model, seed, std=0.3)
    made.model.heads["token"].softcap = softcap
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(system())


def drawn(part: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """A part of arbitrary weights, in float64."""
    randomise(part, seed, std=0.2)  # type: ignore[arg-type]
    return part


def text(rows: int = 3, n: int = 12, seed: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


# ---- what a base is --------------------------------------------------------------------------------------------------


def test_states_are_what_the_head_reads_and_have_seen_no_token_behind_them(base):
    ids = text()
    h = base.states(ids)
    assert torch.equal(base.logits(h), base.system.logits(ids))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    again = base.states(changed)
    assert torch.equal(h[:, :7], again[:, :7]) and not torch.equal(h[:, 7], again[:, 7])


def test_a_fingerprint_tells_models_apart_and_number_formats_together():
    made, other = system().float(), system(1).float()
    first = Base(made).fingerprint
    assert Base(other).fingerprint != first
    assert Base(system().bfloat16()).fingerprint == first
    integers = system().float()
    quantize(integers.model, "int8")
    assert Base(integers).fingerprint == first
    with torch.no_grad():  # an adapter's work: matrices change, and nothing else
        made.model.get_parameter("backbone.layers.0.qkv").mul_(1.5)
    assert Base(made).fingerprint == first
    assert Base(made).exact_fingerprint != Base(system().float()).exact_fingerprint


@pytest.mark.parametrize("weights", [None, "int8", *(["packed"] if packs() else [])])
def test_a_limited_head_says_of_its_ids_what_the_whole_one_says(weights):
    made, kind = system(softcap=5.0).float(), torch.bfloat16 if weights == "packed" else torch.float32
    made.model.to(kind)
    if weights:
        quantize(made.model, weights)
        assert Base(made).fingerprint == Base(system().float()).fingerprint
    head, ids = made.model.heads["token"], torch.tensor([3, 20, 7])
    h = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0)).to(kind)
    assert torch.allclose(head.limited(ids).logits(h), head.logits(h)[..., ids], atol=1e-6, rtol=torch.finfo(kind).eps)
    assert torch.equal(head.limited().logits(h), head.logits(h))
    assert float(head.logits(h).abs().max()) > 1.0


# ---- the loss --------------------------------------------------------------------------------------------------------


def by_the_formula(part, base, x, ids, decay, teacher):
    """Sum and count over heads and places, one after another."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    drafted = list(range(VOCAB)) if part.output.ids is None else part.output.ids.tolist()
    for row in range(len(ids)):
        for i in range(1, x.shape[2] + 1):
            for t in range(ids.shape[1] - 1 - i):
                token = int(ids[row, t + 1 + i])
                if token not in drafted:
                    continue
                said = torch.log_softmax(part.output(x[row, t, i - 1][None], first=i - 1)[0], -1)
                if teacher is None:
                    nats = -said[drafted.index(token)]
                else:
                    nats = -(torch.softmax(base.logits(teacher[row, t + i])[drafted], -1) * said).sum()
                total, count = total + decay**i * nats, count + decay**i
    return total, count


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("vocab", [None, 9])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_and_its_gradients_are_those_of_the_formula(own, vocab, distilled, softcap, monkeypatch):
    monkeypatch.setattr(drafting, "CHUNK", 60)  # many pieces
    base = Base(system(softcap=softcap))
    part = drawn(Medusa(MedusaConfig(heads=3, own_output=own, draft_vocab=vocab), base))
    if vocab:
        part.output.draft_only(base, torch.tensor([1, 2, 5, 8, 9, 13, 17, 20, 23]))
        drawn(part)
    ids = text()
    h = base.states(ids)
    teacher = h if distilled else None
    x = part(h)
    want, number = by_the_formula(part, base, x, ids, 0.7, teacher)
    got, count, _ = losses_ahead(part.output, x, ids, 0.7, teacher)
    assert torch.allclose(got, want, rtol=1e-12) and math.isclose(float(count), number)
    parameters = list(part.parameters())
    for a, b in zip(
        torch.autograd.grad(2 * got, parameters, retain_graph=True), torch.autograd.grad(2 * want, parameters),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12) and float(b.abs().max()) > 0


def test_figures_count_what_stands_first_and_among_the_first_five_and_what_is_covered(base):
    part = drawn(Medusa(MedusaConfig(heads=2, draft_vocab=12), base))
    ids = text(4, 20)
    part.output.draft_only(base, ids.flatten().unique()[:12])
    h = base.states(ids)
    with torch.no_grad():
        x = part(h)
        _, _, told = losses_ahead(part.output, x, ids)
        for i in (1, 2):
            logits = part.output(x)[:, : 20 - 1 - i, i - 1]
            best, label = part.output.tokens(logits.topk(5, -1).indices), ids[:, 1 + i :]
            hits = best == label[..., None]
            assert math.isclose(told[f"top1_{i}"], float(hits[..., 0].double().mean()))
            assert math.isclose(told[f"top5_{i}"], float(hits.any(-1).double().mean()))
            kept = torch.isin(label, part.output.ids)
            nats = F.cross_entropy(logits[kept], part.output.labels(label[kept]))
            assert math.isclose(told[f"loss_{i}"], float(nats), rel_tol=1e-9)
    assert 0 < told["covered"] < 1 and math.isclose(
        told["covered"], float(torch.isin(ids[:, 2:], part.output.ids).double().mean())
    )


def test_windows_that_are_too_short_for_the_heads_are_refused(base):
    part = Medusa(MedusaConfig(heads=4), base)
    with pytest.raises(ValueError, match="4 tokens ahead need windows of at least 6"):
        part.loss(base, torch.zeros(1, 5, WIDTH), torch.zeros(1, 5, dtype=torch.long), Generator(0))


def test_the_tokens_that_are_drafted_are_at_most_those_of_the_base(base):
    with pytest.raises(ValueError, match="draft_vocab is 25, and the base has 24"):
        Medusa(MedusaConfig(draft_vocab=25), base)
    with pytest.raises(ValueError, match="at least 1 token"):
        MedusaConfig(draft_vocab=0)


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def light() -> Base:
    return Base(system().float())


def test_states_are_computed_once_and_equal_those_of_the_base_to_bfloat16(light, tmp_path, monkeypatch):
    ids = windows(torch.arange(200) % VOCAB, 10, 100)
    assert ids.shape == (10, 10)
    made = states_of(light, ids, tmp_path)
    batch = made.take(torch.tensor([7, 0]))
    want = light.states(ids[[7, 0]].long())
    assert float((batch["state"].float() - want).abs().max() / want.abs().max()) < 0.05
    assert torch.equal(batch["token"], ids[[7, 0]].long())
    monkeypatch.setattr(light, "states", None)  # nobody asks again
    assert torch.equal(states_of(light, ids, tmp_path).state, made.state)


def test_other_text_windows_or_weights_have_states_of_their_own(light, tmp_path):
    ids = windows(torch.arange(200) % VOCAB, 10, 50)
    other = Base(system().float())
    with torch.no_grad():
        other.model.get_parameter("backbone.layers.1.up").mul_(1.1)
    for base, text_ids in ((light, ids), (light, (ids + 1) % VOCAB), (light, ids.view(10, 5)), (other, ids)):
        states_of(base, text_ids, tmp_path)
    assert len(list(tmp_path.glob("*.bf16"))) == 4


def test_states_that_were_cut_off_go_on_where_they_were(light, tmp_path, monkeypatch):
    from seriatim.posttraining import states

    monkeypatch.setattr(states, "AT_ONCE", 10)
    monkeypatch.setattr(states, "NOTED", 0.0)
    ids = windows(torch.arange(300) % VOCAB, 10, 100)

    class Stopped(Exception):
        pass

    def stop(done: int, of: int) -> None:
        if done == 6:
            raise Stopped

    with pytest.raises(Stopped):
        states_of(light, ids, tmp_path, stop)
    asked: list[int] = []
    whole, real = states_of(light, ids, tmp_path / "whole").state, light.states
    monkeypatch.setattr(light, "states", lambda x: asked.append(len(x)) or real(x))
    assert torch.equal(states_of(light, ids, tmp_path).state, whole)
    assert sum(asked) == 4, "six windows were there"
    assert not list(tmp_path.glob("*.part"))


def test_windows_do_not_overlap_and_are_spread_over_the_text():
    stream = torch.arange(1000)
    taken = windows(stream, 30, 300)
    assert taken.shape == (10, 30) and taken[0, 0] == 0 and taken[-1, -1] == 999
    assert len(taken.flatten().unique()) == 300
    with pytest.raises(ValueError, match="1,000 tokens, and a window takes 1,001"):
        windows(stream, 1001, 5000)


def test_a_disk_that_is_too_small_is_a_clear_error(light, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="take fewer --tokens"):
        states_of(light, windows(torch.arange(200) % VOCAB, 10, 50), tmp_path)


# ---- training --------------------------------------------------------------------------------------------------------


def run(base: Base, folder, home, steps: int = 12, resume: bool = False, tick=None, kind=Hydra, seed: int = 5):
    """A training on a text of period 5."""
    torch.manual_seed(seed)
    part = kind(kind.Config(heads=2), base)
    stream = torch.tensor([1, 7, 3, 20, 11] * 60)
    both = states_of(base, windows(stream, 16, 250), home)
    learner = DraftLearner(part, base)
    recipe = Recipe(steps, batch=4, learning_rate=3e-2, weight_decay=0.0, seed=seed)
    history = train(learner, both, recipe, RunFolder(folder), {"k": 1}, both, resume, tick=tick)
    return learner, history


@pytest.mark.parametrize("kind", [Medusa, Hydra])
def test_heads_learn_and_their_base_stays_bit_for_bit(kind, light, tmp_path):
    before = {k: v.clone() for k, v in light.model.state_dict().items()}
    _, history = run(light, tmp_path / "a", tmp_path, 50, kind=kind)
    last = history[-1]
    assert last["held_out_loss"] < 0.5 * history[0]["loss"]
    assert last["held_out_top1_1"] > 0.9 and last["held_out_top1_2"] > 0.9, "what follows is certain"
    assert all(torch.equal(v, before[k]) for k, v in light.model.state_dict().items())


def test_a_training_that_was_stopped_goes_on_bit_for_bit(light, tmp_path):
    def stop(step, steps, figures):
        if step == 5:
            raise KeyboardInterrupt

    whole, _ = run(light, tmp_path / "whole", tmp_path)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("seriatim.training.trainer.SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(light, tmp_path / "cut", tmp_path, tick=stop)
    monkey.undo()
    resumed, _ = run(light, tmp_path / "cut", tmp_path, resume=True)
    for (name, a), (_, b) in zip(whole.part.state_dict().items(), resumed.part.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(tmp_path / x / "metrics.jsonl")]
        for x in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


def test_the_state_of_a_training_holds_the_part_and_not_its_base(light, tmp_path):
    from safetensors.torch import load_file

    learner, _ = run(light, tmp_path / "a", tmp_path, 2)
    own = {f"model.part.{k}" for k in learner.part.state_dict()}
    assert {k for k in load_file(tmp_path / "a" / "state.safetensors") if k.startswith("model.")} == own
    assert load_file(tmp_path / "a" / "draft.safetensors").keys() == learner.part.state_dict().keys()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_part_comes_back_as_it_was_saved(light, tmp_path):
    part = drawn(Hydra(HydraConfig(heads=2, layers=2, draft_vocab=10, prefix=True), light)).float()
    part.output.draft_only(light, torch.arange(3, 23, 2))
    part.chance = ((0.5, 0.25), (0.25, 0.125))
    save_part(part, light, tmp_path, "my-model", {"chance": part.chance, "steps": 3})
    again = load_part(tmp_path, light, Hydra)
    assert again.config == part.config and again.chance == part.chance
    h = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    path = torch.cat([h, h], -1)
    assert torch.equal(again.output(again(1, path)[:, None]), part.output(part(1, path)[:, None]))
    assert again.output.tokens(torch.tensor([0, 9])).tolist() == [3, 21]


def test_a_part_is_loaded_in_the_number_format_of_its_base(light, tmp_path):
    save_part(drawn(Medusa(MedusaConfig(heads=2), light)).float(), light, tmp_path)
    narrow = Base(system().bfloat16())
    part = load_part(tmp_path, narrow, Medusa)
    assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    integers = system().float()
    quantize(integers.model, "int8")
    part = load_part(tmp_path, Base(integers), Medusa)
    h = torch.randn(1, WIDTH)
    assert part.output.best(part(h), 3).shape == (1, 2, 3)


def test_in_float16_a_base_is_known_by_its_numbers(tmp_path):
    """They are rounded twice on the way to the bfloat16 of a fingerprint."""
    save_part(Medusa(MedusaConfig(heads=2), Base(system().float())), Base(system().float()), tmp_path)
    half = Base(system().half())
    assert half.fingerprint != Base(system().float()).fingerprint, "or this test shows nothing"
    assert {p.dtype for p in load_part(tmp_path, half, Medusa).parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="was trained for"):
        load_part(tmp_path, Base(system(1).half()), Medusa)


def test_a_part_of_another_base_is_refused_and_both_are_named(light, tmp_path):
    save_part(Medusa(MedusaConfig(), light), light, tmp_path, "zoo:mine")
    other = Base(system(1).float())
    with pytest.raises(ValueError, match=f"trained for zoo:mine .{light.fingerprint}.*{other.fingerprint}.*--base"):
        load_part(tmp_path, other, Medusa)


def test_files_that_are_missing_cut_short_or_something_else_are_named(light, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no draft\.json"):
        load_part(tmp_path, light, Medusa)
    save_part(Medusa(MedusaConfig(), light), light, tmp_path)
    with pytest.raises(ValueError, match="holds a part of medusa, and hydra is asked for"):
        load_part(tmp_path, light, Hydra)
    card = json.loads((tmp_path / "draft.json").read_text())
    for broken, message in (
        ({**card, "config": {"heads": 4, "evil": 1}}, "no setting evil"),
        ({**card, "config": {"heads": "many"}}, "not understood|not supported"),
        ({**card, "config": {"heads": 3}}, "other shapes"),
        ({**card, "training": {"chance": "much"}}, "not understood"),
        ({"key": "medusa"}, "not the card of a draft part"),
        ([1, 2], "not the card of a draft part"),
    ):
        (tmp_path / "draft.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            load_part(tmp_path, light, Medusa)
    (tmp_path / "draft.json").write_text(json.dumps(card)[:40])
    with pytest.raises(ValueError, match="cut short"):
        load_part(tmp_path, light, Medusa)
    (tmp_path / "draft.json").write_text(json.dumps(card))
    file = tmp_path / "draft.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short"):
        load_part(tmp_path, light, Medusa)
