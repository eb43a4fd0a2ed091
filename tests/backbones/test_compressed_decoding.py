"""Decoding over compressed keys and values.

The book-keeping is tested with a codec that loses nothing (`Verbatim`): over it every decoding must be that of the
exact cache, whatever rows, drafts and layers do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.backbones.compressed import Block, Codec
from seriatim.backbones.hybrid import Hybrid, HybridConfig
from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.backbones.relative import Relative
from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Truncate
from seriatim.decoding.beam import Beam
from seriatim.decoding.draft import DraftModel, NGram
from seriatim.decoding.layers import LayerPlan, PromptRouters, Saturation, Staircase
from seriatim.decoding.loop import Decider, Proposer, Step, decode, select_rows
from seriatim.decoding.policy import FreeCache
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, Recursive, Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model, Rows
from seriatim.random import Keyed

torch.set_num_threads(1)


class Verbatim(Codec):
    """Loses nothing: the bytes of the numbers themselves."""

    def encode(self, x: Tensor, along: int) -> Block:
        nothing = x.new_zeros(*x.shape[:-2], 0)
        return Block(x.flatten(-2).contiguous().view(torch.uint8), *([nothing] * 5))

    def decode(self, block: Block, along: int, dtype: torch.dtype) -> Tensor:
        return block.codes.contiguous().view(dtype).unflatten(-1, (self.buffer, -1)).clone()


WIDTH, VOCAB, LENGTH = 16, 5, 40


def language(backbone: torch.nn.Module | None = None, order: Line | None = None, seed: int = 0) -> Model:
    """A random next-token model in float64."""
    backbone = backbone or Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE(50.0)))
    embed, head = TokenEmbed(VOCAB, WIDTH), CategoricalHead(WIDTH, VOCAB)
    return randomise(Model(line(LENGTH), order or Line(1), embed, backbone, head), seed)


def of(**more: Any) -> Transformer:
    return Transformer(TransformerConfig(**{"width": WIDTH, "depth": 2, "heads": 2, "rope": RoPE(50.0)} | more))


MIXER = MambaConfig(WIDTH, 1, head_dim=8, state=5, groups=2, chunk=4)
MODELS: dict[str, Callable[[], Model]] = {
    "plain": language,
    "grouped queries": lambda: language(of(heads=4, kv_heads=1)),
    "no learned start": lambda: language(order=Line(0)),
    "windows": lambda: language(of(kinds=("near", "all")), Line(1, windows={"near": 5})),
    "relative": lambda: language(of(rope=None, relative=Relative(8, 16))),
    "capped": lambda: language(of(softcap=3.0)),
    "hybrid": lambda: language(Hybrid(HybridConfig(WIDTH, 2, 2, rope=RoPE(50.0), attends=(1,), mixer=MIXER))),
}
PROMPTS = [[1, 2, 3, 1, 2], [4], [2, 2, 0, 1, 3, 3, 1, 0, 4, 1, 2]]


class Noting:
    """A decider that notes the law behind the last known token of each row, by row and how many tokens are known."""

    def __init__(self, inner: Decider):
        self.inner, self.rows, self.needs = inner, {}, getattr(inner, "needs", frozenset())

    def decide(self, canvas: Canvas, guess: Any, rows: Rows, random: Any) -> Step:
        said = torch.log_softmax(rows.dist.logits[:, 0], -1)
        for name, known, law in zip(canvas.row.tolist(), canvas.lengths().tolist(), said, strict=True):
            self.rows[name, known] = law
        return self.inner.decide(canvas, guess, rows, random)


def begun(model: Model, prompts: list[list[int]], new: int, names: list[int] | None = None) -> Canvas:
    known = torch.tensor([len(p) for p in prompts])
    size = int(known.max()) + new
    value = torch.zeros(len(prompts), size, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        value[b, : len(prompt)] = torch.tensor(prompt)
    alike = bool((known == known[0]).all())
    canvas = model.canvas({"token": value}, int(known[0]) if alike else known, layout=line(size))
    if not alike:
        canvas.apply([Truncate(known + new)])
    if names is not None:
        canvas.row = torch.tensor(names)
    return canvas


def written(
    model: Model, codec: Codec | None, prompts: list[list[int]], decider: Decider | None = None,
    proposer: Proposer | None = None, names: list[int] | None = None, new: int = 16, seed: int = 3, fill: int = 0,
) -> tuple[list[list[int]], dict[Any, Tensor]]:  # fmt: skip
    """Texts, and what was read on the way. fill: slots of a forward that only remembers (0: none)."""
    canvas = begun(model, prompts, new, names)
    target, noting = Target(model, codec=codec), Noting(decider or SampleAll())
    with torch.inference_mode():
        if fill:
            target.prefill(canvas, fill)
        for _ in decode(target, canvas, noting, proposer, Keyed(seed)):
            pass
    texts = [v[: len(p) + new] for v, p in zip(canvas.value["token"].tolist(), prompts, strict=True)]
    return texts, noting.rows


def gap(a: dict[Any, Tensor], b: dict[Any, Tensor], alike: int = 100) -> float:
    """Between two laws of the same places, the first `alike` steps of a row, at most."""
    first = {row: min(n for r, n in a if r == row) for row, _ in a}
    both = [(row, n) for row, n in a.keys() & b.keys() if n < first[row] + alike]
    assert len(both) >= 5
    return max(float((a[k] - b[k]).abs().max()) for k in both)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one row", "rows of three lengths"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_codec_that_loses_nothing_is_invisible(kind: str, prompts: list[list[int]]) -> None:
    """Whatever the model, and in rows of different lengths; as is a buffer that is never full."""
    model = MODELS[kind]()
    want, rows = written(model, None, prompts)
    for codec, fill in ((Verbatim(buffer=4), 0), (Verbatim(buffer=3), 3), (Codec(2, buffer=LENGTH), 0)):
        got, met = written(model, codec, prompts, fill=fill)
        assert got == want and gap(rows, met) < 1e-9


def test_fewer_bits_are_further_away() -> None:
    model = language()
    _, rows = written(model, None, PROMPTS, new=24)
    gaps = []
    for bits in (16, 8, 2):
        codec = Codec(bits, buffer=4, outliers=0, rank=0)
        gaps.append(gap(rows, written(model, codec, PROMPTS, new=24)[1], alike=5))
    assert 0 < gaps[0] < gaps[1] < gaps[2]


def test_16_bits_are_near_enough_for_the_same_text() -> None:
    for kind in MODELS:
        model = MODELS[kind]()
        want, rows = written(model, None, PROMPTS)
        got, met = written(model, Codec(16, buffer=4), PROMPTS)
        assert got == want and gap(rows, met) < 0.02


@pytest.mark.parametrize("codec", [Codec(2, buffer=4), Codec(4, buffer=3, outliers=0)])
def test_a_row_does_not_depend_on_its_company(codec: Codec) -> None:
    model = language()
    alone = [written(model, codec, [p], names=[i])[0][0] for i, p in enumerate(PROMPTS)]
    for order in ([0, 1, 2], [2, 0], [1, 2, 0]):
        texts, _ = written(model, codec, [PROMPTS[i] for i in order], names=order)
        assert texts == [alone[i] for i in order]


# ---- drafts ----------------------------------------------------------------------------------------------------------

DRAFTS: dict[str, Callable[[Model], tuple[Decider, Proposer]]] = {
    "n-grams": lambda model: (Walk(), NGram(5, (2, 1))),
    "a model's tree": lambda model: (Walk(), DraftModel(Target(model), (-1, -1, 0, 0, 2, 3), "top")),
    "the same model": lambda model: (Walk(), DraftModel(Target(model), 7, "top")),
}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one row", "rows of three lengths"])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_draft_leaves_texts_and_laws_as_they_are_with_the_codec(drafts: str, prompts: list[list[int]]) -> None:
    """No draft reaches past the end of a block, so all that is verified has the past of plain decoding."""
    model, codec = language(), Codec(2, buffer=6, rank=1)
    for seed in range(2):
        want, rows = written(model, codec, prompts, seed=seed, new=24)
        got, met = written(model, codec, prompts, *DRAFTS[drafts](model), seed=seed, new=24)
        assert got == want and len(met) < len(rows)
        assert gap(rows, met) < 1e-9


def test_a_draft_past_the_end_of_a_block_would_read_another_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison finds it."""
    monkeypatch.setattr(Target, "_shorten", lambda *_: None)
    model, codec = language(), Codec(2, buffer=6, rank=1)
    for seed in range(3):
        want, _ = written(model, codec, PROMPTS, seed=seed, new=24)
        got, _ = written(model, codec, PROMPTS, *DRAFTS["the same model"](model), seed=seed, new=24)
        if got != want:
            return
    pytest.fail("texts are the same")


@pytest.mark.parametrize("verifier", [Chain, Recursive])
def test_drafts_that_are_drawn_are_cut_at_a_depth_whatever_they_hold(verifier: type) -> None:
    """What is dropped, whole depths, does not depend on what was drawn there: with a codec that loses nothing these
    verifiers accept all of a draft from the model itself, block for block."""
    model = language()
    siblings: Any = "independent" if verifier is Chain else "distinct"
    canvas, target = begun(model, PROMPTS[:1], 24), Target(model, codec=Verbatim(buffer=6))
    drafts = DraftModel(Target(model), 8, siblings)
    with torch.inference_mode():
        steps = list(decode(target, canvas, verifier(), drafts, Keyed(0)))
    assert all(step.drafted == step.accepted <= 5 for step in steps) and len(steps) < 8


def test_kept_paths_of_a_tree_are_committed_inside_the_buffer() -> None:
    """Blocks hold the tokens of the text in order, whatever was dropped between them."""
    model = language()
    texts, rows = written(model, None, PROMPTS, *DRAFTS["a model's tree"](model), new=24)
    got, met = written(model, Verbatim(buffer=6), PROMPTS, *DRAFTS["a model's tree"](model), new=24)
    assert got == texts and gap(rows, met) < 1e-9


# ---- layers that are skipped -----------------------------------------------------------------------------------------

PLANS: dict[str, LayerPlan] = {
    "fewer and fewer": Staircase.linear(3, 2, 8),
    "saturated": Saturation(0.0, run=1, bottom=0, top=0, warmup=2),
    "routed": PromptRouters(torch.zeros(3, WIDTH), torch.tensor([9.0, -9.0, 9.0])),
}


@pytest.mark.parametrize("kind", PLANS)
def test_layers_that_are_skipped_are_skipped_in_blocks_too(kind: str) -> None:
    """Later tokens skip what earlier ones did, so that nobody looks at what stands there."""
    model, texts, skipped = language(of(depth=3)), [], []
    for codec in (None, Verbatim(buffer=4)):
        canvas, target = begun(model, PROMPTS[:1], 20), Target(model, layers=PLANS[kind], codec=codec)
        for _ in decode(target, canvas, SampleAll(), random=Keyed(1)):
            pass
        texts.append(canvas.value["token"].tolist())
        assert target.skipping is not None
        skipped.append(target.skipping.tally.share)
    assert texts[0] == texts[1] and skipped[0] == skipped[1] < 1


# ---- rows that come and go -------------------------------------------------------------------------------------------


def test_beams_fork_blocks_too() -> None:
    model = language()
    texts = []
    for codec in (None, Verbatim(buffer=3)):
        canvas = begun(model, PROMPTS[:1], 12)
        with torch.inference_mode():
            for _ in decode(Target(model, codec=codec), canvas, Beam(3)):
                pass
        texts.append(canvas.value["token"].tolist())
    assert texts[0] == texts[1]


def test_rows_are_dropped_copied_and_admitted_between_steps() -> None:
    model, texts = language(), []
    for codec in (None, Verbatim(buffer=3)):
        canvas, target = begun(model, PROMPTS, 16, [0, 1, 2]), Target(model, codec=codec)
        new = begun(model, [[3, 3, 3, 3]], canvas.layout.size - 4, [7])
        for turn, _ in enumerate(decode(target, canvas, SampleAll(), random=Keyed(1))):
            if turn == 6:
                select_rows(target, canvas, torch.tensor([2, -1, 0, 2]), new)
        texts.append((canvas.row.tolist(), canvas.value["token"].tolist()))
    assert texts[0] == texts[1]


# ---- what it is not for ----------------------------------------------------------------------------------------------


def test_models_without_keys_and_orders_that_are_no_line_are_refused() -> None:
    mamba = language(Mamba(MambaConfig(WIDTH, 2, head_dim=8, state=5)))
    with pytest.raises(ValueError, match="no keys and values to compress"):
        Target(mamba, codec=Codec(buffer=8))
    embed, head = TokenEmbed(VOCAB, WIDTH, mask=True), CategoricalHead(WIDTH, VOCAB)
    blocks = Model(line(8), Blocks(2), embed, of(), head)
    with pytest.raises(ValueError, match="Blocks is another order"):
        Target(blocks, codec=Codec(buffer=8))
    with pytest.raises(ValueError, match="FreeCache needs a cache that can evict"):
        Target(language(), policy=FreeCache(2), codec=Codec(buffer=8))
