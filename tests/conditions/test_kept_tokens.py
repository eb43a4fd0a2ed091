"""Guidance of masked models away from a hidden prompt, whose kept tokens stay visible, and its use by systems."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from seriatim.cli.main import main
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import Select
from seriatim.decoding.target import Branch, Target
from seriatim.laws.case import randomise
from seriatim.laws.interface import small
from seriatim.layout import line
from seriatim.random import Keyed
from seriatim.systems.system import Sampling
from seriatim.systems.text import fast_dllm_v2, mdlm, sdar
from seriatim.tokenizers.text import ByteTokenizer
from seriatim.verbs.generate import generate as written
from seriatim.verbs.train import train

V, W, HIDDEN = 7, 1.5, 6  # the last id looks like a mask: a prompt of it is one that is hidden
PROMPT = [1, 2, 3, 1, 4]
SHAPE = {"length": 16, "vocab": V, "width": 16, "depth": 2, "heads": 2}


def model_of(kind):
    """A model for which one id is embedded as the mask is."""
    if kind == "mdlm":
        model = mdlm.build(mdlm.Config(**SHAPE))
    elif kind == "sdar":
        model = sdar.build(sdar.Config(**SHAPE, block=4))
    else:
        model = fast_dllm_v2.build(fast_dllm_v2.Config(**SHAPE, block=4, part=4))
    randomise(model)
    with torch.no_grad():
        model.embed.table[HIDDEN] = model.embed.mask
    return model.requires_grad_(False)


def laws(model, prompt, guidance=None, gaps=False, cached=True, follow=None):
    """Logits of what is read at each step, and the text; `follow`: decide the same tokens."""
    value = torch.tensor([[*prompt, *[0] * (12 - len(prompt))]])
    known = torch.arange(12)[None] < len(prompt)
    if gaps:
        known[0, 2] = False
    canvas = model.canvas({"token": value}, known, layout=line(12))
    met, target = [], Target(model, None, guidance, cached=cached)
    while (plan := target.plan(canvas)) is not None:
        rows = target.forward(plan, canvas)
        met.append((rows.element, rows.dist.logits))
        step = Select("random", 12).decide(canvas, None, rows, Keyed(3))
        if follow is not None:
            edit = step.edits[0]
            edit.value = follow.gather(1, edit.element.clamp(min=0))
        target.commit(step.keep, plan)
        canvas.apply(step.edits)
    return met, canvas.value["token"]


@pytest.mark.parametrize(("kind", "gaps"), [("mdlm", False), ("mdlm", True), ("sdar", False), ("fast-dllm-v2", False)])
@pytest.mark.parametrize("keep", [(), (1,), (1, 4)])
def test_the_second_opinion_sees_masks_for_all_of_the_prompt_but_what_is_kept(kind, gaps, keep):
    """(1 + w) of the prompt's law less w of that of a prompt whose other tokens look like masks; also cached."""
    model = model_of(kind)
    branch = Branch(Guidance(W), hide="given", keep=keep)
    for cached in (True, False):
        guided, text = laws(model, PROMPT, (branch,), gaps, cached)
        full, _ = laws(model, PROMPT, None, gaps, follow=text)
        bare = [i if i in keep else HIDDEN for i in PROMPT]
        null, _ = laws(model, bare, None, gaps, follow=text)
        assert len(guided) == len(full) == len(null) > 3
        for (e, got), (e2, a), (e3, b) in zip(guided, full, null, strict=True):
            assert torch.equal(e, e2) and torch.equal(e, e3)
            read = e.expand(1, -1) >= 0
            torch.testing.assert_close(got[read], ((1 + W) * a - W * b)[read], rtol=0, atol=1e-9)
        others, _ = laws(model, [HIDDEN] * 5 if keep else PROMPT, None, gaps, follow=text)
        assert max(float((a - b).abs().max()) for (_, a), (_, b) in zip(null, others, strict=True)) > 1e-3


def test_decoded_tokens_are_not_hidden_even_if_the_prompt_is():
    """A history "earlier" than the step is; kept ids stay visible there, too."""
    model = model_of("mdlm")
    texts = {}
    for hide, keep in itertools.product(("given", "earlier"), ((), (1, 2, 3, 4, 0, 5))):
        branch = Branch(Guidance(W), hide=hide, keep=keep)
        _, text = laws(model, PROMPT, (branch,))
        texts[hide, bool(keep)] = text.tolist()
    _, plain = laws(model, PROMPT)
    assert texts["given", True] == plain.tolist(), "where all is kept, nothing is guided"
    assert texts["given", False] != texts["earlier", False]


@pytest.mark.parametrize(
    ("branch", "said"),
    [
        ({"hide": "given", "keep": (V,)}, "the ids 0 to 6, not 7"), ({"keep": (1,)}, "hides nothing"),
        ({"hide": "given", "keep": (-1,)}, "not -1"),
    ],
)  # fmt: skip
def test_branches_that_keep_nothing_are_refused(branch, said):
    with pytest.raises(ValueError, match=said):
        Target(model_of("mdlm"), None, (Branch(Guidance(1.0), **branch),))


# ---- systems ---------------------------------------------------------------------------------------------------------


def system_of(key):
    config = {"length": 32, "width": 16, "depth": 2, "heads": 2}
    system = (
        mdlm.MDLM(mdlm.Config(**config, block=8), ByteTokenizer())
        if key == "mdlm"
        else sdar.SDAR(sdar.Config(**config, block=4), ByteTokenizer())
    )
    randomise(system.model)
    return system.eval().requires_grad_(False)


@pytest.mark.parametrize("key", ["mdlm", "sdar"])
def test_guidance_of_a_system_hides_the_prompt(key):
    system, greedy = system_of(key), {"temperature": 0.0, "steps": 8}
    plain = written(system, prompt="abcab", length=12, **greedy)
    guided = written(system, prompt="abcab", length=12, guidance=2.0, **greedy)
    kept = written(system, prompt="abcab", length=12, guidance=2.0, keep_tokens=["a", "b", 99], **greedy)
    assert kept == plain != guided, "99 is c: nothing of the prompt is hidden"
    canvas = system.prompted("abcab", 12)
    target = Target(system.model, None, (Branch(Guidance(2.0), hide="given"),), Sampling(**greedy).warp)
    generate(target, canvas, system.decider(Sampling(**greedy)), random=Keyed(0))
    assert system.tokenizer.decode(canvas.value["token"][0, 5:].tolist()) == guided


def test_a_prompt_that_is_empty_guides_nothing_and_gaps_are_guided_by_both_sides():
    system, greedy = system_of("mdlm"), {"temperature": 0.0, "steps": 8}
    met = []
    for sampling in (Sampling(), Sampling(guidance=3.0)):
        canvas, target = system.prompted("", 8), system.target(None, sampling)
        met.append(target.forward(target.plan(canvas), canvas).dist.logits)
    torch.testing.assert_close(met[0], met[1])
    texts = [written(system, infix="abc<mask:6>def", guidance=g, **greedy) for g in (0.0, 3.0)]
    assert texts[0] != texts[1] and all(x.startswith("abc") and x.endswith("def") for x in texts)


def test_a_cache_policy_follows_both_branches():
    """At its neutral setting, one block, the texts are equal."""
    from seriatim.systems.decoders import decoder_of

    system, s = system_of("mdlm"), Sampling(temperature=0.0, guidance=2.0)
    texts = [
        "".join(system.stream("abc", 12, s, decoding=decoder_of(system, spec, s)))
        for spec in ("unmask+block=4", "freecache-guided+block=32", "fast-dllm+cache=none+threshold=none+block=4")
    ]
    assert texts[0] == texts[2] and len(texts[1]) > 0
    steps: list = []
    list(system.stream("abc", 12, s, decoding=decoder_of(system, "fast-dllm+cache=dual+block=4", s), trace=steps))
    assert steps


@pytest.mark.parametrize(
    ("key", "more", "said"),
    [
        ("mdlm", {"keep_tokens": ["a"]}, "give guidance, too"),
        ("mdlm", {"keep_tokens": ["nothing"], "guidance": 1.0}, "'nothing' is 7 tokens"),
        ("mdlm", {"keep_tokens": [272], "guidance": 1.0}, "knows the ids 0 to 271, not 272"),
        ("next-token", {"keep_tokens": ["a"], "guidance": 1.0}, "guided by no hidden prompt"),
        ("next-token", {"guidance": 1.0}, "unconditional"),
    ],
)
def test_what_cannot_be_guided_says_so(key, more, said):
    system = small() if key == "next-token" else system_of(key)
    with pytest.raises(ValueError, match=said):
        written(system, prompt="ab", length=4, **more)


def test_the_command_guides(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 50, encoding="utf-8")
    tiny = {"length": 32, "width": 16, "depth": 1, "heads": 1, "steps": 1, "batch": 2}
    for key in ("mdlm", "next-token"):
        train(key, book, out=tmp_path / key, settings=tiny)
    command = ["generate", str(tmp_path / "mdlm"), "--prompt", "ab", "--length", "8", "--json"]
    said = []
    for more in ([], ["--guidance", "4"], ["--guidance", "4", "--keep-tokens", "a", "--keep-tokens", "98"]):
        assert main([*command, *more]) == 0
        said.append(json.loads(capsys.readouterr().out)["text"])
    assert said[0] == said[2] != said[1]
    for wrong, told in (
        (["--keep-tokens", "a"], "give guidance"),
        (["--guidance", "1", "--keep-tokens", "qq"], "2 to"),
    ):
        assert main([*command, *wrong]) == 2 and told in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "next-token"), "--prompt", "ab", "--guidance", "1"]) == 2
    assert "nothing to guide it by" in capsys.readouterr().err
