"""Decoders that verify by ratio or by trees, as users meet them: by name, with models from folders; and Jacobi windows
on pictures. Tiny random models, in number formats where nothing is a matter of rounding."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from seriatim.cli.main import main
from seriatim.decoding.loop import decode
from seriatim.evaluation.forward_cost import measured
from seriatim.interop.translate import translated
from seriatim.laws.case import randomise
from seriatim.laws.drafts import near
from seriatim.laws.enumeration import enumerate_rows
from seriatim.random import Keyed
from seriatim.systems.decoder.spec_sampling import Options, between
from seriatim.systems.decoder.tree_verify import shape
from seriatim.systems.decoders import Ask, decoder_of
from seriatim.systems.draft_model import draft_model
from seriatim.systems.image.raster_ar import Config as RasterConfig
from seriatim.systems.image.raster_ar import RasterAR
from seriatim.systems.image.raster_ar import build as build_raster
from seriatim.systems.system import Sampling
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.tokenizers.pieces import translation
from seriatim.tokenizers.text import ByteTokenizer, PairTokenizer
from seriatim.training.checkpoint import save_json, save_weights

torch.set_num_threads(1)
NAMES = ("spec-sampling", "tree-verify", "spectr")
PROMPT = "abcabcab"
TEXT = ["the cat sat on the mat and the cat sat on the hat"] * 3


def kept(system: NextToken, folder: Path) -> str:
    """A model as a training leaves it."""
    save_json({"system": "next-token", "config": vars(system.config)}, folder / "run.json")
    save_json(system.tokenizer.to_json(), folder / "tokenizer.json")
    save_weights(system.model, folder / "model.safetensors")
    return str(folder)


def built(vocab: int = ByteTokenizer.vocab, tokenizer=None, length: int = 96, seed: int = 5) -> NextToken:
    system = NextToken(Config(length=length, vocab=vocab, width=32, depth=2, heads=2), tokenizer)
    randomise(system.model, seed=seed, std=0.35)
    return system.float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def system() -> NextToken:
    return built()


@pytest.fixture(scope="module")
def small(system, tmp_path_factory) -> str:
    """The folder of a model that is often right."""
    return kept(near(system, 0.1), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def pairs() -> PairTokenizer:
    return PairTokenizer.train(TEXT, 300)


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", NAMES)
def test_greedy_texts_are_those_of_plain_decoding_in_fewer_forwards(system, small, key):
    prompts = [PROMPT, "the cat", "x"]
    plain = system.generate(prompts, temperature=0, max_new_tokens=40)
    ours = system.generate(prompts, f"{key}:{small}", temperature=0, max_new_tokens=40)
    assert [g.ids for g in ours] == [g.ids for g in plain]
    alone = system.generate(PROMPT, f"{key}:{small}", temperature=0, max_new_tokens=40)
    assert alone.ids == plain[0].ids and alone.forwards < 30 and alone.accepted > 10
    assert sum(alone.rows) == alone.forwards + alone.drafted and alone.drafting > 0
    assert plain[0].rows == (1,) * 40 and plain[0].drafting == 0


def test_a_tree_of_the_likeliest_paths_writes_the_string_of_plain_sampling(system, small):
    for temperature in (0.7, 1.0):
        settings = {"temperature": temperature, "top_p": 0.95, "max_new_tokens": 60, "seed": 3}
        plain = system.generate([PROMPT, "xyz"], **settings)
        ours = system.generate([PROMPT, "xyz"], f"tree-verify:{small}+nodes=10+depth=3+width=3", **settings)
        assert [g.ids for g in ours] == [g.ids for g in plain]
        assert ours[0].accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_trained_model_writes_the_same_500_tokens_from_trees(temperature):
    """In float32, under the same noise; drafted by itself."""
    from seriatim.verbs.load import load

    trained = load("zoo:text-base")
    settings = {"temperature": temperature, "top_p": 0.95, "max_new_tokens": 500, "seed": 5, "stop": [-1]}
    plain = trained.generate("def main(", **settings)
    ours = trained.generate("def main(", "tree-verify:zoo:text-base+nodes=8+depth=4+width=3", **settings)
    assert ours.ids == plain.ids and len(set(plain.ids)) > 50
    assert plain.forwards == 500 and ours.forwards < 250


def test_more_drafts_stand_in_a_tree_than_in_a_chain_of_as_many_nodes(system, small):
    settings = {"temperature": 1.0, "max_new_tokens": 80, "seed": 1}
    forwards = {
        spec: sum(system.generate(PROMPT, spec, **settings | {"seed": s}).forwards for s in range(4))
        for spec in (f"tree-verify:{small}+nodes=6+depth=3", f"tree-verify:{small}+nodes=6+depth=6+width=1")
    }
    tree, chain = forwards.values()
    assert tree < chain


@pytest.mark.parametrize("siblings", ["independent", "distinct"])
def test_trees_of_drawn_siblings_are_decoded_to_the_end(system, small, siblings):
    made = system.generate([PROMPT, "x"], f"tree-verify:{small}+siblings={siblings}", max_new_tokens=30, stop=[-1])
    assert [len(g.ids) for g in made] == [30, 30] and made[0].accepted > 0


def test_the_shape_of_drawn_trees_has_the_nodes_that_are_reached_most():
    assert shape(1, 4, 4) == (-1,)
    assert shape(2, 4, 4) == (-1, 0)  # 0.6, and 0.6 of that
    assert shape(3, 4, 4) == (-1, -1, 0)  # the second child of the root is reached with 0.4 x 0.6 = 0.24
    assert shape(4, 4, 4) == (-1, -1, 0, 2)  # 0.6 x 0.6 x 0.6 = 0.216
    assert shape(100, 2, 2) == (-1, -1, 0, 0, 1, 1)


# ---- draft models ----------------------------------------------------------------------------------------------------


def test_a_draft_model_is_loaded_once_and_again_when_its_files_change(system, tmp_path, monkeypatch):
    from seriatim.verbs import load as verb

    loads = []
    load = verb.load
    monkeypatch.setattr(verb, "load", lambda source: loads.append(source) or load(source))
    place = kept(near(system, 0.1), tmp_path)
    first = draft_model(place, system)
    assert draft_model(place, system) is first and loads == [place]
    os.utime(tmp_path / "model.safetensors", (1, 2**31))
    assert draft_model(place, system) is not first and len(loads) == 2


def test_a_draft_model_computes_in_the_format_of_its_target(system, small):
    wide = copy.deepcopy(system).double()
    assert next(draft_model(small, wide).model.parameters()).dtype == torch.float64
    assert next(draft_model(small, system).model.parameters()).dtype == torch.float32


def test_another_tokenizer_is_refused_with_both_named(system, pairs, tmp_path):
    place = kept(built(pairs.vocab, pairs), tmp_path)
    with pytest.raises(
        ValueError, match=rf"{place} \(next-token, bpe, {pairs.vocab} ids\) and the model \(next-token, bytes, 272"
    ):
        system.generate(PROMPT, f"spec-sampling:{place}")
    with pytest.raises(ValueError, match=r"exchange ids whose texts agree \(262\) by \+translate=true"):
        draft_model(place, system)


def test_another_vocabulary_without_a_tokenizer_is_refused(pairs, tmp_path):
    bare = built(280)
    bare.__dict__["tokenizer"] = None
    place = kept(built(pairs.vocab, pairs), tmp_path)
    with pytest.raises(ValueError, match=rf"has {pairs.vocab} ids and next-token 280"):
        draft_model(place, bare)


def test_a_vocabulary_that_is_padded_is_no_other_one(system, tmp_path):
    """The same tokenizer, more rows in the matrices: ids beyond are never drafted."""
    padded = built(320, ByteTokenizer(), seed=7)
    for one, other in ((system, padded), (padded, system)):
        place = kept(other, tmp_path / str(other.config.vocab))
        draft = draft_model(place, one)
        ids = torch.tensor([one.prompt_ids(PROMPT)])
        said, own = draft.logits(ids), other.float().logits(ids)
        assert said.shape[-1] == one.config.vocab
        assert torch.equal(said[..., :262], own[..., :262]) and bool((said[..., 272:] == -torch.inf).all())
        assert one.generate(PROMPT, f"spectr:{place}", max_new_tokens=20, stop=[-1]).drafted > 0


@pytest.mark.parametrize("key", NAMES)
def test_drafts_of_another_tokenizer_are_exchanged_where_texts_agree(system, pairs, tmp_path, key):
    place = kept(built(pairs.vocab, pairs), tmp_path)
    plain = system.generate(PROMPT, temperature=0, max_new_tokens=30)
    ours = system.generate(PROMPT, f"{key}:{place}+translate=true", temperature=0, max_new_tokens=30)
    assert ours.ids == plain.ids and ours.drafted > 0


def test_a_translated_model_says_what_it_would_of_the_ids_that_agree(pairs):
    """Every byte is an id of both: there the logits are the model's own; other ids are impossible."""
    theirs = built(pairs.vocab, pairs)
    same, like = translation(ByteTokenizer(), pairs)
    ours = copy.copy(theirs)
    ours._modules = {**theirs._modules, "model": translated(theirs.model, same, like)}
    ids = torch.tensor([list(b"xq zk")])
    said, want = ours.logits(ids), theirs.logits(same[ids])
    assert torch.equal(said[..., :256], want[..., same[:256]])
    assert bool((said[..., same < 0] == -torch.inf).all()) and int((same < 0).sum()) == 10
    with pytest.raises(ValueError, match="no piece in common"):
        translated(theirs.model, torch.full((5,), -1), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="only models that read and say"):
        translated(build_raster(), same, like)


def test_what_cannot_draft_is_refused_by_name(system, tmp_path):
    with pytest.raises(ValueError, match="name a small model of the same vocabulary"):
        system.generate(PROMPT, "spec-sampling")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        system.generate(PROMPT, f"tree-verify:{tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match="no next-token model"):
        system.generate(PROMPT, "spectr:zoo:raster-ar")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spec-sampling:{}+draft_length=0", "draft_length is at least 1"),
        ("spec-sampling:{}+draft_length=96", "at most 95, one less than the model takes; got 96"),
        ("tree-verify:{}+nodes=0", "at least 1 node"), ("tree-verify:{}+depth=0", "depth is at least 1"),
        ("tree-verify:{}+siblings=twins", "siblings are independent, distinct, top, not 'twins'"),
        ("spectr:{}+drafts=0", "at least 1 draft"), ("spectr:{}+draft_length=-1", "draft_length is at least 1"),
        ("sjd+window=0", "window is at least 1"), ("sjd+initialiser=left", "initialiser is random, horizontal"),
        ("sjd+initialiser=vertical", "only pictures have an above"), ("sjd:{}", "needs no other model"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(system, small, spec, message):
    with pytest.raises(ValueError, match=message):
        decoder_of(system, spec.format(small), Sampling())


def test_a_text_that_outgrows_its_draft_is_written_to_the_end(system):
    """The draft takes 24 tokens and knows 24 places: behind these every forward is a plain one."""
    from seriatim.laws.drafts import another

    plain = system.generate(PROMPT, temperature=0, max_new_tokens=60)
    little = another(system.config.vocab).float()
    little.model.layout = build_raster(RasterConfig(side=1)).layout  # of one element: nothing is ever drafted
    ask = Ask(system, Sampling(temperature=0), (), None, Options())
    assert system.generate(PROMPT, between(ask, little), temperature=0, max_new_tokens=60).drafted == 0
    short = near(built(length=24), 0.0)
    made = system.generate(PROMPT, between(ask, short), temperature=0, max_new_tokens=60)
    assert made.ids == plain.ids and made.accepted > 3
    assert made.rows[-30:] == (1,) * 30


@pytest.mark.parametrize("batch", [1, 3])
def test_long_prompts_are_brought_into_the_draft_in_chunks(batch):
    """Longer than a chunk, and of different lengths: drafts are those of a draft that read it at once."""
    system = built(length=1400)
    ids = torch.randint(256, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids[: 1300 - 500 * row] for row in range(batch)]
    plain = system.generate(prompts, temperature=0, max_new_tokens=12)
    way = between(Ask(system, Sampling(temperature=0), (), None, Options()), near(system, 0.0))
    ours = system.generate(prompts, way, temperature=0, max_new_tokens=12)
    assert [g.ids for g in ours] == [g.ids for g in plain]
    assert ours[0].forwards == 3, "a draft that is its target is always right"


@pytest.fixture(scope="module")
def answering(tmp_path_factory) -> tuple[object, str]:
    """A tiny model of two halves, and the folder of one near it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    large = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in large.parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.dim() == 1 else 0.6 * torch.randn_like(p))
    folders = []
    for _ in range(2):
        folders.append(str(tmp_path_factory.mktemp("t5")))
        large.save_pretrained(folders[-1])
        with torch.no_grad():
            for p in large.parameters():
                p.add_(0.02 * torch.randn_like(p))
    from seriatim.verbs.load import load

    return load(folders[0], torch.float32), folders[1]


@pytest.mark.parametrize("key", NAMES)
def test_an_encoder_decoder_is_drafted_for_by_one_that_reads_the_same_prompts(answering, key):
    system, folder = answering
    prompts = [[5, 9, 33, 17, 1], [7, 1]]
    plain = system.generate(prompts, temperature=0, max_new_tokens=24, stop=[])
    ours = system.generate(prompts, f"{key}:{folder}", temperature=0, max_new_tokens=24, stop=[])
    assert [g.ids for g in ours] == [g.ids for g in plain]
    assert sum(g.accepted for g in ours) > 5
    twice = system.generate(prompts, f"{key}:{folder}", n=2, temperature=0, max_new_tokens=24, stop=[])
    assert [g.ids for g in twice] == [g.ids for g in plain for _ in range(2)]


def test_models_of_two_kinds_do_not_draft_for_each_other(answering, system, small):
    with pytest.raises(ValueError, match=r"continues a text, and this model \(t5\) answers one that an encoder reads"):
        draft_model(small, answering[0])
    with pytest.raises(ValueError, match=r"\(t5\) answers one that an encoder reads, and this model \(.*\) continues"):
        draft_model(answering[1], system)


def test_the_cost_of_forwards_is_measured_of_models_of_two_halves_too(answering):
    cost = measured(answering[0], 50, rows=(1, 4), budget=0.0)
    assert cost.rows == (1, 4) and cost.context == 50


# ---- Jacobi windows on pictures --------------------------------------------------------------------------------------


class Plain:
    """Ids as pictures: nothing to look at."""

    def __init__(self, side: int):
        self.grid, self.vocab = (side, side), 3

    def decode(self, codes):
        return (codes.float() - 1).view(len(codes), 1, *self.grid)


def raster(side: int = 2, vocab: int = 3) -> RasterAR:
    config = RasterConfig(side=side, vocab=vocab, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    system = RasterAR(config, Plain(side))
    randomise(system.model, seed=3)
    return system.eval().requires_grad_(False)


def law(system: RasterAR, spec: str, sampling: Sampling) -> dict:
    def run(random, rows):
        canvas = system.model.blank(rows)
        way = decoder_of(system, spec, sampling, ())
        target = system.target(system.condition(torch.ones(rows, dtype=torch.long), rows), sampling, **way.target)
        with torch.inference_mode():
            for _ in decode(target, canvas, way.decider, way.proposer, random):
                pass
        return [tuple(row) for row in canvas.value["token"].tolist()]

    return enumerate_rows(run)


@pytest.mark.parametrize("initialiser", ["random", "horizontal", "vertical"])
@pytest.mark.parametrize("sampling", [Sampling(guidance=1.5), Sampling(top_k=2, guidance=0.7)], ids=["all", "top-k"])
def test_windows_on_pictures_have_the_guided_law_whatever_enters(initialiser, sampling):
    """All pictures of four elements, enumerated: guided rows of both forwards are compared."""
    system = raster()
    want, got = law(system, "ancestral", sampling), law(system, f"sjd+window=2+initialiser={initialiser}", sampling)
    assert abs(sum(got.values()) - 1) < 1e-12
    assert sum(abs(want.get(x, 0) - got.get(x, 0)) for x in {*want, *got}) / 2 < 1e-12
    assert (
        sum(abs(p - q) for p, q in zip(want.values(), law(system, "ancestral", Sampling()).values(), strict=False))
        > 0.1
    )


def test_the_vertical_initialiser_repeats_what_stands_above():
    system = raster(4)
    way = decoder_of(system, "sjd+window=3+initialiser=vertical", Sampling(), ())
    canvas = system.model.blank(1)
    canvas.value["token"][0, :6] = torch.tensor([0, 1, 2, 2, 1, 0])
    canvas.length = 6
    target = system.target(system.condition(None, 1), Sampling())
    with torch.inference_mode():
        next(decode(target, canvas, way.decider, way.proposer, Keyed(0)))
        guess = way.proposer.propose(canvas, target, Keyed(0))
    assert guess.value[0].tolist() == canvas.value["token"][0, 3:6].tolist()


def test_pictures_take_no_more_forwards_than_elements_and_say_when_each_was_decided():
    system = raster(4)
    labels = torch.tensor([0, 1, 2])
    plain = system.draw(labels, film=True)
    assert (
        plain.forwards == 16 and plain.decided.tolist() == [[[4 * r + c + 1 for c in range(4)] for r in range(4)]] * 3
    )
    ours = system.draw(labels, seed=1, film=True, decoder="sjd+window=6")
    assert ours.forwards < 16 and ours.images.shape == plain.images.shape
    order = ours.decided.flatten(1)
    assert bool((order.diff() >= 0).all()) and int(order.min()) == 1 and int(order.max()) == ours.forwards
    assert bool((order.diff() == 0).any()), "several elements in one forward"


def test_greedy_pictures_are_those_of_plain_decoding():
    system, greedy = raster(4), Sampling(temperature=0, guidance=0.5)
    labels = torch.tensor([0, 2])
    plain, ours = (system.draw(labels, sampling=greedy, decoder=d) for d in ("ancestral", "sjd+window=5"))
    assert torch.equal(plain.images, ours.images) and ours.forwards < plain.forwards


def test_decoders_of_next_tokens_suit_no_other_order():
    from seriatim.verbs.generate import generate

    with pytest.raises(ValueError, match="--decoder sjd needs a next-token model; for var there are own"):
        generate("zoo:var", decoder="sjd")
    with pytest.raises(ValueError, match="did you mean sjd"):
        generate("zoo:raster-ar", decoder="sj")


def test_the_command_draws_pictures_by_a_decoder(tmp_path, capsys):
    out = str(tmp_path / "letters")
    command = ["generate", "zoo:raster-ar", "--decoder", "sjd+window=8", "--label", "R", "--count", "2", "--out", out]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pictures"] == 2 and told["forwards"] < 64
    assert {Path(p).name for p in told["files"]} == {"samples.png", "film.gif", "order.png"}
