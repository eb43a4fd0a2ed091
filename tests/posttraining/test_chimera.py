"""Chimera's layer: what its encoders see, that drafting step by step is teacher forcing, and that published weights say
what the released modules say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seriatim.decoding.feature_draft import FeatureDraft, chain
from seriatim.decoding.growth import Static
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Target
from seriatim.decoding.templates import EAGLE, of_paths
from seriatim.decoding.verify import Walk
from seriatim.interop.draft_heads import load_published_heads, published_heads
from seriatim.laws.case import randomise
from seriatim.laws.drafts import untrained
from seriatim.posttraining.chimera import Chimera, ChimeraConfig
from seriatim.posttraining.drafting import Base, DraftLearner, load_part, save_part
from seriatim.posttraining.heads import chances
from seriatim.random import Generator, Keyed
from seriatim.systems.text.next_token import Config, NextToken

torch.set_num_threads(1)
VOCAB, WIDTH, HEADS = 24, 32, 3


def system_of() -> NextToken:
    config = Config(length=64, vocab=VOCAB, width=WIDTH, depth=2, heads=4, hidden=40)
    system = NextToken(config, SimpleNamespace(special={}))  # type: ignore[arg-type]
    randomise(system.model, 3, 0.3)
    return system.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def system() -> NextToken:
    return system_of()


@pytest.fixture(scope="module")
def part(system) -> Chimera:
    return untrained(Chimera, ChimeraConfig(heads=HEADS), system)[0]


def text(system: NextToken, rows: int = 2, n: int = 11) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (rows, n), generator=torch.Generator().manual_seed(4))
    return ids, system.states(ids)


def vectors(part: Chimera, system: NextToken, ids: Tensor) -> Tensor:
    """Of the tokens that are looked at behind each state but the last."""
    return system.model.embed.vectors(ids[:, part.looks_at(torch.arange(1, ids.shape[1]))])


# ---- what it sees ----------------------------------------------------------------------------------------------------


def test_grams_are_the_three_tokens_and_at_the_start_the_first_ones(part):
    assert part.looks_at(torch.arange(5)).tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_a_token_that_is_older_than_two_places_changes_no_gram(system, part):
    ids, _ = text(system)
    before = part.grams(vectors(part, system, ids))
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    moved = (part.grams(vectors(part, system, changed)) - before).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [i in (3, 4, 5) for i in range(10)]  # of tokens 4, 5 and 6


def test_every_known_token_changes_the_draft_through_the_states(system, part):
    def drafted(ids: list[int]) -> Tensor:
        known = torch.tensor([ids])
        h, e = system.states(known)[:, :-1], vectors(part, system, known)
        return part.choices(part.estimates(h, e, 1)[0][:, -1:], h[:, -1:], 1, 5).log_prob

    ids = [1, 4, 2, 7, 3, 3, 0, 9]
    for i in range(len(ids)):
        changed = [*ids[:i], (ids[i] + 1) % VOCAB, *ids[i + 1 :]]
        assert not torch.allclose(drafted(ids), drafted(changed), atol=1e-9), i


def test_drafting_ahead_with_forced_tokens_is_teacher_forcing(system, part):
    """The estimates of a text in one pass a depth, against pairs that are fed one behind another."""
    ids, h = text(system)
    found = part.estimates(h[:, :-1], vectors(part, system, ids), HEADS)
    n = ids.shape[1]
    for t in range(n - 1):
        states = h[:, : t + 1]
        for depth in range(1, HEADS + 1):
            if t + depth >= n:
                break
            e = vectors(part, system, ids[:, : t + depth + 1])
            f = part.layer(part.enter(states, e), chain(0, t + depth, part.places))[:, -1:]
            assert torch.allclose(found[depth - 1][:, t : t + 1], f, atol=1e-10), (t, depth)
            states = torch.cat([states, f], 1)


def test_no_estimate_sees_behind_the_tokens_it_is_given(system, part):
    ids, h = text(system)
    before = part.reads(Base(system), h, ids)
    later, behind = h.clone(), ids.clone()
    later[:, 5] += 1.0
    behind[:, 6] = (behind[:, 6] + 1) % VOCAB
    for depth in range(1, HEADS + 1):
        state = (part.reads(Base(system), later, ids) - before)[:, :, depth - 1].abs().amax((0, 2)) > 1e-9
        token = (part.reads(Base(system), h, behind) - before)[:, :, depth - 1].abs().amax((0, 2)) > 1e-9
        last = 10 - depth  # states behind which the text is long enough
        assert not bool(state[:5].any()) and bool(state[5:last].all())
        assert not bool(token[: 6 - depth].any()) and bool(token[6 - depth : last].all())


# ---- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("vocab", [None, 8])
def test_at_first_heads_read_the_sum_of_state_and_estimate(system, own, vocab):
    torch.manual_seed(0)
    ids, h = text(system)
    base = Base(system)
    for shared in (False, True):
        config = ChimeraConfig(heads=HEADS, own_output=own, draft_vocab=vocab, shared=shared)
        part = Chimera(config, base).double()
        if vocab:
            part.output.draft_only(base, torch.arange(5, 13))
        reads = part.reads(base, h, ids)
        mean = (reads[..., :WIDTH] + reads[..., WIDTH:]) / 2
        want = 2 * base.logits(mean)
        want = want if vocab is None else want[..., 5:13]
        assert torch.allclose(part.output(reads), want, atol=1e-5 if own else 1e-10)
        assert float(want.detach().abs().max()) > 1
        best = part.choices(reads[:, :4, 2, WIDTH:], h[:, :1], 3, 2)
        alone = base.logits(reads[:, :4, 2, WIDTH:] + h[:, :1]).masked_fill(
            ~((torch.arange(VOCAB) >= 5) & (torch.arange(VOCAB) < 13)) & (vocab is not None), -torch.inf
        )
        assert torch.equal(best.token, alone.topk(2, -1).indices)


def test_at_first_the_layer_hands_on_the_newest_gram(system):
    ids, h = text(system)
    part = Chimera(ChimeraConfig(), Base(system)).double()
    e = vectors(part, system, ids)
    found = part.estimates(h[:, :-1], e, 2)
    grams = nn.functional.linear(e.flatten(-2), part.narrow)
    assert torch.allclose(found[0], grams, atol=1e-6)
    assert torch.allclose(found[1][:, :-1], grams[:, 1:], atol=1e-6)


def test_at_first_grams_are_half_as_large_as_states_however_small_tokens_are(system):
    torch.manual_seed(0)
    base = Base(system)
    ids, h = text(system, 8, 40)
    for part in (Chimera(ChimeraConfig(), base).double(), Chimera(ChimeraConfig(gram=1), base).double()):
        grams = part.grams(vectors(part, system, ids))
        ratio = grams.square().mean().sqrt() / h.square().mean().sqrt()
        assert 0.3 < float(ratio.detach()) < 0.7


def test_heads_of_their_own_differ_and_a_shared_one_does_not(system, part):
    x = torch.randn(1, 2 * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(HEADS, -1)
    assert not torch.allclose(part.output(x)[0], part.output(x)[1], atol=1e-3)
    one = untrained(Chimera, ChimeraConfig(heads=HEADS, shared=True), system)[0]
    assert torch.allclose(one.output(x)[0], one.output(x)[2], atol=1e-12) and one.ahead == HEADS


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distill", [False, True])
def test_loss_is_the_cross_entropy_of_each_head_and_the_distance_of_states(system, distill):
    ids, h = text(system)
    config = ChimeraConfig(heads=HEADS, decay=0.5, feature=0.3, distill=distill)
    part, base = untrained(Chimera, config, system)
    total, count, figures = part.loss(base, h, ids, Generator(0))
    reads, want, terms, far = part.reads(base, h, ids), 0.0, 0.0, 0.0
    for i in range(1, HEADS + 1):
        x = reads[:, : 10 - i, i - 1]
        said = torch.log_softmax(part.output(x[:, :, None], i - 1)[:, :, 0], -1)
        taught = (
            torch.softmax(base.logits(h[:, i:10]), -1) if distill else nn.functional.one_hot(ids[:, 1 + i :], VOCAB)
        )
        want += 0.5**i * -(taught * said).sum()
        terms += 0.5**i * said[..., 0].numel()
        estimate = part.estimates(h[:, :-1], vectors(part, system, ids), i)[-1][:, : 11 - i]
        distance = ((estimate - h[:, i:]) ** 2).mean()
        assert figures[f"feature_{i}"] == pytest.approx(float(distance), rel=1e-5)
        far += distance / HEADS
    assert float(count) == pytest.approx(terms)
    assert torch.allclose(total, want + 0.3 * terms * far, rtol=1e-6)


def test_all_parameters_of_a_part_are_trained_and_none_of_the_base(system):
    ids, h = text(system)
    for config in (ChimeraConfig(heads=2), ChimeraConfig(heads=2, own_output=True, shared=True, gram=2, fused=False)):
        base = Base(system)
        learner = DraftLearner(randomise(Chimera(config, base), 1), base)  # type: ignore[arg-type]
        total, _ = learner({"token": ids, "state": h}, Generator(0), 0, 1)
        total.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learner.part.parameters())
        assert all(p.grad is None for p in system.model.parameters())


def test_a_part_is_the_same_after_saving_and_loading(system, tmp_path):
    part, base = untrained(Chimera, ChimeraConfig(heads=2, draft_vocab=10, gram=2), system)
    part.output.draft_only(base, torch.arange(3, 23, 2))
    save_part(part, base, tmp_path)
    again = load_part(tmp_path, base, Chimera)
    ids, h = text(system)
    assert again.config == part.config
    assert torch.equal(part.output(part.reads(base, h, ids)), again.output(again.reads(base, h, ids)))


def test_how_often_candidates_stand_is_measured_as_of_other_heads(system, part):
    class Windows(list):
        def take(self, index):
            ids, h = text(system, 2, 20)
            return {"token": ids[index], "state": h[index]}

    found = chances(part, Base(system), Windows([0, 1]))
    assert len(found) == HEADS and all(0 <= c <= 1 for row in found for c in row)
    assert sum(found[0]) > 0


def test_impossible_parts_are_refused():
    for wrong in ({"heads": 0}, {"gram": 0}, {"gram": 4}):
        with pytest.raises(ValueError, match="at least 1 head, and 1 to 3 tokens"):
            ChimeraConfig(**wrong)
    with pytest.raises(ValueError, match="decay"):
        ChimeraConfig(decay=0.0)


@pytest.mark.parametrize(
    "config", [ChimeraConfig(heads=3, gram=1), ChimeraConfig(heads=3, gram=2, fused=False), ChimeraConfig(heads=4)]
)
def test_every_variant_writes_the_text_of_plain_decoding(system, config):
    proposer = FeatureDraft(untrained(Chimera, config, system)[0], Static(EAGLE.cut(config.heads)))
    texts = []
    for way in (proposer, None):
        canvas = system._begun([[1, 4, 2]], 24)
        with torch.inference_mode():
            steps = list(decode(Target(system.model), canvas, Walk(), way, Keyed(1)))
        texts.append(canvas.value["token"].tolist())
        assert way is None or int(sum(s.drafted for s in steps)) > 20
    assert texts[0] == texts[1]


# ---- published weights -----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class Released(nn.Module):
    """Chimera's modules under their released names, and the forward of the first depth: states, then trigrams, causal
    in all four quadrants."""

    def __init__(self, transformers: Any):
        super().__init__()
        self.config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, rms_norm_eps=1e-5, attn_implementation="eager",
        )  # fmt: skip
        self.trimlp = nn.Sequential(Residual(3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False))
        self.llama = transformers.LlamaModel(self.config)
        self.llama.norm = nn.Identity()
        self.chimera_head = nn.ModuleList(nn.Sequential(nn.Linear(2 * WIDTH, VOCAB, bias=False)) for _ in range(HEADS))

    def forward(self, e: Tensor, h: Tensor) -> Tensor:
        """Estimates behind the states h (b, n, d), from the vectors (b, n + 1, d) of the tokens from the first on."""
        n = h.shape[1]
        first = [torch.cat([e[:, i] for i in where], -1)[:, None] for where in ((0, 0, 0), (0, 1, 1))]
        grams = self.trimlp(torch.cat([*first, torch.cat([e[:, :-2], e[:, 1:-1], e[:, 2:]], -1)], 1))
        causal = torch.full((n, n), torch.finfo(torch.float32).min).triu(1).repeat(2, 2)[None, None]
        place = torch.cat([torch.arange(n), torch.arange(1, n + 1)])[None]
        x = torch.cat([h, grams[:, 1:]], 1)
        causal = causal.expand(len(h), -1, -1, -1)
        return self.llama(inputs_embeds=x, attention_mask=causal, position_ids=place).last_hidden_state[:, n:]

    def files(self) -> dict[str, dict[str, Tensor]]:
        layer = {f"0.{name}": x for name, x in self.llama.layers[0].state_dict().items()}
        parts = {"trimlp": self.trimlp.state_dict(), "chimera_head": self.chimera_head.state_dict()}
        return {stem: {k: x.clone() for k, x in t.items()} for stem, t in (parts | {"fast_layer1": layer}).items()}


@pytest.fixture(scope="module")
def theirs() -> Released:
    module = Released(pytest.importorskip("transformers"))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 1.0))
    return module.eval()


def write(folder: Path, files: dict[str, dict[str, Tensor]], ending: str = ".safetensors", **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"chimera_num_heads": HEADS, "chimera_num_layers": 1} | settings))
    for stem, tensors in files.items():
        if ending == ".safetensors":
            save_file(tensors, folder / f"{stem}{ending}")
        else:
            torch.save(tensors, folder / f"{stem}{ending}")
    return folder / f"trimlp{ending}"


@pytest.fixture(scope="module")
def single() -> NextToken:
    system = system_of()
    system.model.float()
    return system


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_published_weights_say_what_the_released_modules_say(single, theirs, tmp_path, ending):
    file = write(tmp_path, theirs.files(), ending)
    assert published_heads(tmp_path, "chimera") == file
    part = load_published_heads(file, Base(single), "chimera", pickled=True)
    ids, h = text(single)
    h = h[:, :-1]
    with torch.no_grad():
        want = theirs(single.model.embed.vectors(ids), h)
        got = part.estimates(h, vectors(part, single, ids), 1)[0]
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
        for i in range(HEADS):
            said = theirs.chimera_head[i](torch.cat([h, want], -1))
            mine = part.output(torch.cat([h, got], -1)[:, :, None], i)[:, :, 0]
            assert torch.allclose(mine, said, atol=1e-4 * float(said.abs().max())) and float(said.std()) > 2
            best = part.choices(got[:, 4:5], h[:, 4:5], i + 1, 3)
            assert torch.equal(best.token[:, 0], said[:, 4].topk(3, -1).indices)


@pytest.mark.parametrize("trap", ["grams", "halves", "norm"])
def test_parity_would_notice_a_wrong_reading(single, theirs, tmp_path, trap):
    files = theirs.files()
    if trap == "grams":
        for name in ("0.linear.weight", "1.weight"):
            files["trimlp"][name] = files["trimlp"][name].roll(WIDTH, 1)
    if trap == "halves":
        files["chimera_head"]["0.0.weight"] = files["chimera_head"]["0.0.weight"].roll(WIDTH, 1)
    if trap == "norm":
        files["fast_layer1"]["0.input_layernorm.weight"].fill_(1.0)
    part = load_published_heads(write(tmp_path, files), Base(single), "chimera")
    ids, h = text(single)
    h = h[:, :-1]
    with torch.no_grad():
        want = theirs(single.model.embed.vectors(ids), h)
        said = theirs.chimera_head[0](torch.cat([h, want], -1))
        got = part.estimates(h, vectors(part, single, ids), 1)[0]
        mine = part.output(torch.cat([h, got], -1)[:, :, None])[:, :, 0]
    assert not torch.allclose(mine, said, atol=1e-3 * float(said.abs().max()))


def test_what_is_cut_short_or_of_another_base_is_refused(single, theirs, tmp_path):
    base, files = Base(single), theirs.files()
    file = write(tmp_path, files, ".pt")
    with pytest.raises(ValueError, match=r"is a pickle.*\+pickled=true"):
        load_published_heads(file, base, "chimera")
    file = write(tmp_path, files, chimera_num_heads=5)
    with pytest.raises(ValueError, match=r"it has 3 heads, and its config\.json says 5"):
        load_published_heads(file, base, "chimera")
    small = {k: {n: x[..., : x.shape[-1] // 2].contiguous() for n, x in t.items()} for k, t in files.items()}
    with pytest.raises(ValueError, match="for this base"):
        load_published_heads(write(tmp_path, small), base, "chimera")
    (tmp_path / "fast_layer1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs fast_layer1\.safetensors beside it"):
        load_published_heads(file, base, "chimera")


def test_the_released_tree_has_25_nodes_of_depth_5():
    paths = [[0], [1], [2], [3], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0]]
    paths += [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1], [1, 0, 0]]
    paths += [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert of_paths(paths) == EAGLE and EAGLE.size == 25 and EAGLE.depth == 5
