"""What is asked of models that decide masks and cannot be: one clear answer at the command line and in Python, before
anything is written; and streams, which give out what is decided for good."""

from __future__ import annotations

import pytest

from seriatim.cli.main import main
from seriatim.decoding.beam import Beam
from seriatim.decoding.remask import ReMDM
from seriatim.decoding.sample import Remask, Select
from seriatim.decoding.unmask import Unmask
from seriatim.evaluation.text_film import Recorder
from seriatim.laws.interface import small
from seriatim.systems.converted import converted
from seriatim.systems.decoders import Decoding, decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text import sdar
from seriatim.verbs.generate import generate
from seriatim.verbs.load import load
from support.tiny_chat import write_chat_model

MDLM, BLOCKS, PUBLISHED = "zoo:text-mdlm", "zoo:text-block", "published"
MASK = "<|endoftext|>"  # of the published one
LONG = "import os\n" * 1100

# who, arguments of the command, the same in Python, what is said
MISTAKES = [
    (MDLM, ["--prompt", LONG], {"prompt": LONG}, "this model takes 1024 in all: shorten the prompt or --length"),
    (BLOCKS, ["--prompt", LONG], {"prompt": LONG}, "this model takes 1024 in all: shorten the prompt or --length"),
    (PUBLISHED, ["--prompt", LONG], {"prompt": LONG}, "in all: shorten the prompt or --length"),
    (MDLM, ["--prompt", "a", "--length", "1024"], {"prompt": "a", "length": 1024}, "shorten the prompt or --length"),
    (MDLM, ["--infix", LONG + "<mask:4>"], {"infix": LONG + "<mask:4>"}, "shorten the text or its gaps"),
    (MDLM, ["--infix", "a<mask:2000>"], {"infix": "a<mask:2000>"}, "shorten the text or its gaps"),
    (MDLM, ["--infix", "a<mask:0>b"], {"infix": "a<mask:0>b"}, "a whole number of tokens from 1 on"),
    (MDLM, ["--infix", "no gap"], {"infix": "no gap"}, "nothing is to be filled"),
    (BLOCKS, ["--infix", "a<mask:1>" + " b" * 9], {"infix": "a<mask:1>" + " b" * 9}, "sees nothing behind a block"),
    (PUBLISHED, ["--prompt", f"a{MASK}b"], {"prompt": f"a{MASK}b"}, "token 1 of the text is the mask itself"),
    (PUBLISHED, ["--infix", f"a{MASK}<mask:2>"], {"infix": f"a{MASK}<mask:2>"}, "is the mask itself"),
    (MDLM, ["--ids", "1,2"], None, "give mdlm a --prompt"),
    (MDLM, ["--steps", "0"], {"steps": 0}, "at least 1 step, got 0"),
    (BLOCKS, ["--steps", "-2"], {"steps": -2}, "at least 1 step, got -2"),
    (MDLM, ["--temperature", "-1"], {"temperature": -1.0}, "0 (greedy) or more"),
    (MDLM, ["--top-p", "1.5"], {"top_p": 1.5}, "top_p lies in (0, 1]"),
    *[
        (name, ["--decoder", spec], {"decoder": spec}, said)
        for name, spec, said in (
            (MDLM, "unmask+block=0", "blocks hold at least 1 token"),
            (MDLM, "fast-dllm+block=-4", "blocks hold at least 1 token"),
            (BLOCKS, "unmask+block=3", "takes parts that fill one; got 3"),
            (BLOCKS, "fast-dllm+block=3", "4 is no multiple of 3"),
            (BLOCKS, "unmask+block=8", "blocks of 4 tokens"),
            (MDLM, "unmask+threshold=0", "above 0, and at most 1; got 0"),
            (MDLM, "unmask+threshold=1.01", "above 0, and at most 1; got 1.01"),
            (BLOCKS, "unmask+threshold=-0.5", "above 0, and at most 1; got -0.5"),
            (MDLM, "fast-dllm+threshold=2", "above 0, and at most 1; got 2"),
            (MDLM, "adablock-dllm+threshold=0", "above 0, and at most 1; got 0"),
            (MDLM, "freecache-guided+threshold=7", "above 0, and at most 1; got 7"),
            (MDLM, "unmask+factor=-1", "a factor is above 0; got -1"),
            (MDLM, "fast-dllm+cache=both", "cache is none, prefix or dual, got 'both'"),
            (MDLM, "adablock-dllm+cache=all", "cache is none, prefix or dual, got 'all'"),
            (MDLM, "freecache-guided+agree=never", "agree is equal"),
            (MDLM, "unmask+rule=luck", "rule is random, confidence, margin or entropy, not 'luck'"),
            (MDLM, "unmask+schedule=slow", "schedule is linear, cosine, quadratic, powers, not 'slow'"),
            (MDLM, "unmask+counts=few", "counts are mean or drawn, not 'few'"),
            (MDLM, "unmsk", "did you mean unmask?"),
            (MDLM, "unmask+treshold=1", "has no option 'treshold'"),
            (BLOCKS, "prompt-lookup", "needs a next-token model"),
        )
    ],
]


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """Two of the zoo, and one as others publish them, whose mask is a token of its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    write_chat_model(folder)
    return {MDLM: load(MDLM), BLOCKS: load(BLOCKS), PUBLISHED: converted(load(folder), None, MASK)}


@pytest.mark.parametrize(("name", "command", "python", "said"), MISTAKES, ids=lambda x: None)
def test_one_answer_at_the_command_line_and_in_python(name, command, python, said, systems, monkeypatch, capsys):
    monkeypatch.setattr("seriatim.cli.generating.load", lambda *_: systems[name])  # once for all
    assert main(["generate", name, *command]) == 2
    told = capsys.readouterr()
    assert said in " ".join(told.err.split()) and told.err.startswith("seriatim: ") and told.out == ""
    if python is not None:
        with pytest.raises(ValueError) as error:
            generate(systems[name], **python)
        assert said in " ".join(str(error.value).split())


def test_nothing_to_fill_is_refused(systems, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", MDLM, "--length", "0"])
    assert stop.value.code == 2 and "must be at least 1" in capsys.readouterr().err
    for name in systems:
        with pytest.raises(ValueError, match="at least 1"):
            generate(systems[name], prompt="import", length=0)
    with pytest.raises(ValueError, match="at least 1"):
        systems[PUBLISHED].generate("import", max_new_tokens=0)


def test_a_bound_is_taken_by_draws_of_something(systems):
    for ids, draws, said in (([5, 6], 0, "at least 1 draw"), ([], 4, "at least one is scored")):
        with pytest.raises(ValueError, match=said):
            systems[MDLM].bound(ids, draws=draws)


def test_the_mask_is_refused_among_ids_and_its_name_is_text_where_it_is_no_token(systems):
    for name in (MDLM, BLOCKS, PUBLISHED):
        system = systems[name]
        with pytest.raises(ValueError, match=f"token 2 of the text is the mask itself \\(id {system.mask}\\)"):
            list(system.stream([5, 6, system.mask, 7], 4))
    assert len(generate(systems[MDLM], prompt="<mask> [MASK]", length=2, steps=1)) > 0


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1, float("nan")])
def test_thresholds_of_systems_lie_where_scores_do(threshold):
    with pytest.raises(ValueError, match="above 0, and at most 1"):
        sdar.Config(threshold=threshold)
    assert sdar.Config(rule="entropy", threshold=-0.4).threshold == -0.4


# ---- streams ---------------------------------------------------------------------------------------------------------


WAYS = {
    "own": lambda s: decoder_of(s, "own", Sampling(steps=12)),
    "at random": lambda s: Decoding(Unmask(Select("random", 12), s.stop)),
    "fast": lambda s: decoder_of(s, "fast-dllm+threshold=0.05", Sampling()),
    "remasking": lambda s: Decoding(Unmask(Remask("confidence", 8, again=2), s.stop)),
    "by chance": lambda s: Decoding(ReMDM(8, 0.4)),
}


@pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n in (MDLM, BLOCKS, PUBLISHED) for w in WAYS if (n, w) != (BLOCKS, "by chance")]
)
def test_a_stream_gives_out_what_is_decided_for_good(name, way, systems):
    """Each piece when all before it is decided, and never taken back: what was told is how the text begins at last."""
    system, told = systems[name], []
    recorder = Recorder(system.tokenizer)
    for piece in system.stream("import os", 24, Sampling(), 3, WAYS[way](system), watch=recorder):
        told.append((piece, recorder.frames[-1]))
    assert told
    at_last = recorder.histories[-1]
    begins = len(recorder.frames[0].places) - sum(p.by == "open" for p in recorder.frames[0].places)
    text, whole = "", "".join(piece for piece, _ in told)
    for piece, frame in told:
        text += piece
        known = []
        for token in [place.token for place in frame.places][begins:]:
            if token is None:
                break
            known.append(token)
        assert system.tokenizer.decode(known).startswith(text.rstrip("\ufffd")) and whole.startswith(text)
        assert len(known) < 2 or at_last[begins : begins + 2] == known[:2]
    if getattr(WAYS[way](system).decider, "redraws", False):
        assert len({id(frame) for _, frame in told}) == 1, "all of it at the end"
    elif name == MDLM and way != "fast":
        assert len(told) > 1, "on the way"


def test_a_beam_streams_its_text_when_it_is_found():
    system, pieces = small(), []
    made = system.generate("ab", Decoding(Beam(2, system.stop)), max_new_tokens=8, stream=pieces.append)
    assert pieces == [made.text]


# ---- histories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MDLM, BLOCKS, PUBLISHED])
def test_every_canvas_of_every_step_is_there_by_one_call(name, systems):
    system = systems[name]
    recorder = Recorder(system.tokenizer)
    text = generate(system, prompt="import os", length=12, steps=12, watch=recorder)
    first, *rest = recorder.histories
    prompt = system.tokenizer.encode("import os")
    assert first[: len(prompt)] == prompt and set(first[len(prompt) :]) == {None}
    for before, after in zip([first, *rest], rest, strict=False):
        assert all(a == b for a, b in zip(before, after, strict=False) if a is not None), "what is decided stays"
        assert sum(x is None for x in after) < sum(x is None for x in before)
    assert text.startswith(system.tokenizer.decode(rest[-1][len(prompt) : len(prompt) + 4])[:2])
    assert len(recorder.frames) == len(recorder.histories) > 4
