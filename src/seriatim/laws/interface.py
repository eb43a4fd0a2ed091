"""One interface: what every decoder is asked for on a loaded language model, and whether it gives it.

Each cell of the table runs a tiny model twice, by the decoder and plainly, and compares. A decoder that cannot do what
is asked must refuse with a ValueError that says why; anything else is a fault.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from seriatim.backbones.quantize import packs, quantize
from seriatim.evaluation.lossless import allowed, divergences
from seriatim.laws.case import randomise
from seriatim.laws.decoders import DecoderCase
from seriatim.laws.laws import Broken, require
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import load
from seriatim.systems.system import Sampling

PROMPTS = ("abcabcab", "the cat", "xyxyxyxyxyxy", "1, 2, 3, 1, 2,")
NEW = 16
GREEDY: dict[str, Any] = {"temperature": 0.0}


class Asked:
    """A decoder on a small model with text: at the options of its case, the neutral ones where it is relaxed."""

    def __init__(self, key: str, dtype: torch.dtype = torch.float32, weights: str | None = None):
        self.case: DecoderCase = load(key).case()
        self.system = small(self.case.depth).to(dtype)
        if weights is not None:
            quantize(self.system.model, weights)

    def decoding(self, **settings: Any) -> Decoding:
        known = Sampling.__dataclass_fields__
        sampling = Sampling(**{k: v for k, v in settings.items() if k in known})
        options = self.case.neutral if self.case.neutral is not None else self.case.options
        ends = tuple(x for x in settings.get("stop", ()) if isinstance(x, int)) or self.system.stop
        return self.case.decoder(Ask(self.system, sampling, ends, None, options))

    def texts(self, prompts: Sequence[str] | str, **settings: Any) -> Any:
        """Generations by the decoder."""
        return self.system.generate(prompts, self.decoding(**settings), max_new_tokens=NEW, **settings)

    def plain(self, prompts: Sequence[str] | str, **settings: Any) -> Any:
        return self.system.generate(prompts, "ancestral", max_new_tokens=NEW, **settings)

    def equal(self, prompts: Sequence[str] | str, **settings: Any) -> None:
        """The ids of plain decoding."""
        ours, theirs = self.texts(prompts, **settings), self.plain(prompts, **settings)
        many = isinstance(ours, list)
        a, b = ([g.ids for g in side] if many else [side.ids] for side in (ours, theirs))
        require(a == b, f"it writes {a}, plain decoding {b}")


def small(depth: int = 2) -> Any:
    """A next-token model over bytes, weights drawn at random."""
    from seriatim.systems.text.next_token import Config, NextToken

    system = NextToken(Config(length=64, width=32, depth=depth, heads=2))
    randomise(system.model, seed=5, std=0.35)
    return system.float().eval().requires_grad_(False)


# ---- the columns -----------------------------------------------------------------------------------------------------


def one(key: str) -> None:
    """Greedy, one prompt."""
    for prompt in PROMPTS:
        Asked(key).equal(prompt, **GREEDY)


def batch(key: str) -> None:
    """Greedy, prompts of different lengths."""
    Asked(key).equal(PROMPTS, **GREEDY)


def samples(key: str) -> None:
    """Several of one prompt; each another one than the first, where sampling allows."""
    asked = Asked(key)
    many = asked.texts(PROMPTS[0], n=3, **({} if not asked.case.greedy else GREEDY))
    ended = [len(g.ids) == NEW or g.ids[-1] in asked.system.stop for g in many]
    require(len(many) == 3 and all(ended), "3 whole texts were asked for")
    if not asked.case.greedy:
        require(len({tuple(g.ids) for g in many}) == 3, "samples of one prompt are alike")


def stream(key: str) -> None:
    """Text in pieces, which together are the text."""
    pieces: list[str] = []
    made = Asked(key).texts(PROMPTS[0], stream=pieces.append, **GREEDY)
    require("".join(pieces) == made.text, "the pieces are another text")


def stop_strings(key: str) -> None:
    """A text ends before a string, as plain decoding ends it."""
    asked = Asked(key)
    whole = asked.plain(PROMPTS[0], **GREEDY).text
    string = whole[4:6]
    ours, theirs = (f(PROMPTS[0], stop=[string], **GREEDY) for f in (asked.texts, asked.plain))
    require(ours.text == theirs.text and string not in ours.text, f"it ends as {ours.text!r}, not {theirs.text!r}")


def stop_ids(key: str) -> None:
    """A text ends with an id, also in the middle of a draft."""
    asked = Asked(key)
    stop = asked.plain(PROMPTS[1], **GREEDY).ids[5]
    ours, theirs = (f(PROMPTS, stop=[stop], **GREEDY) for f in (asked.texts, asked.plain))
    require([g.ids for g in ours] == [g.ids for g in theirs], "it ends elsewhere than plain decoding")


def penalties(key: str) -> None:
    """Penalties of what was written, drafted tokens among it."""
    Asked(key).equal(PROMPTS[0], repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, **GREEDY)


def suppressed(key: str) -> None:
    """Without tokens that it would write, and without the one that it would begin with."""
    asked = Asked(key)
    own = asked.plain(PROMPTS[0], **GREEDY).ids
    never, first = tuple({*own[2:5]} - {own[0]}), (own[0],)
    for settings in ({"suppress_tokens": (*never, *first)}, {"suppress_tokens": never, "begin_suppress_tokens": first}):
        asked.equal(PROMPTS, **settings, **GREEDY)
        made = asked.texts(PROMPTS[0], **settings, **GREEDY).ids
        require(made[0] != own[0] and not {*made} & {*never}, "what is suppressed is written")


def filters(key: str) -> None:
    """Temperature, top-k, top-p and min-p: equal texts by the same noise, or possible ones."""
    asked = Asked(key)
    if asked.case.greedy:
        raise ValueError("it draws nothing: temperature and filters are for decoders that sample")
    settings: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
    if asked.case.coupled:
        asked.equal(PROMPTS, **settings)
        return
    target = asked.system.target(None, Sampling(**settings))
    for prompt, made in zip(PROMPTS, asked.texts(PROMPTS, **settings), strict=True):
        ids = asked.system.prompt_ids(prompt)
        said = asked.system.logits(torch.tensor([[*ids, *made.ids]]))[:, len(ids) - 1 : -1]
        law = target.warp(_law(said)).log_probs()[0]  # type: ignore[misc]
        met = law.gather(-1, torch.tensor(made.ids)[:, None])
        require(bool((met > -torch.inf).all()), "it writes what the filters forbid")


def _law(logits: torch.Tensor) -> Any:
    from seriatim.heads.dist import Categorical

    return Categorical(logits)


def logprobs(key: str) -> None:
    """Log-probabilities of what was written."""
    asked = Asked(key)
    ours, theirs = (f(PROMPTS[0], logprobs=True, **GREEDY) for f in (asked.texts, asked.plain))
    close = torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4)
    require(close, "log-probabilities are others than plain decoding's")


def bfloat16(key: str) -> None:
    """Greedy in bfloat16: equal texts, or parted by rounding."""
    _rounded(Asked(key, torch.bfloat16))


def int8(key: str) -> None:
    """Greedy with 8-bit weights: equal texts, or parted by rounding."""
    _rounded(Asked(key, torch.bfloat16, "int8"))


def packed(key: str) -> None:
    """Greedy with weights as the processor multiplies them: equal texts, or parted by rounding."""
    _rounded(Asked(key, torch.bfloat16, "packed"))


def _rounded(asked: Asked) -> None:
    ours, theirs = ([g.ids for g in f(PROMPTS, **GREEDY)] for f in (asked.texts, asked.plain))

    def row(n: int, said: Sequence[int]) -> Any:
        single = copy.copy(asked)  # step by step, as plain decoding met it
        ids = [*single.system.prompt_ids(PROMPTS[n]), *said]
        return single.system.logits(torch.tensor([ids]))[0, -1]

    found = divergences(ours, theirs, row, torch.bfloat16)
    require(allowed(found, torch.bfloat16), f"texts part by more than rounding: {found}")


COLUMNS: dict[str, Callable[[str], None]] = {
    "greedy": one, "batch": batch, "samples": samples, "stream": stream, "stop strings": stop_strings,
    "stop ids": stop_ids, "penalties": penalties, "suppressed": suppressed, "filters": filters, "logprobs": logprobs,
    "bf16": bfloat16, "int8": int8,
}  # fmt: skip
if packs():
    COLUMNS["packed"] = packed
REQUIRED = ("greedy", "batch")  # of all; the others of those that are lossless


def cell(key: str, column: str) -> str:
    """ "yes", or why a decoder refuses. Raises `Broken` where it neither does what is asked nor refuses."""
    try:
        COLUMNS[column](key)
    except ValueError as reason:
        if len(str(reason)) < 20:
            raise Broken(f"it refuses without saying why: {reason}") from reason
        return str(reason)
    return "yes"
