"""Decoders: a file each, found by its key, under systems/decoder (of next-token models) or systems/unmasking (of models
that decide tokens in any order).

Such a file has `META` (family "decoder" or "unmasking"), `Options` (a frozen dataclass of its settings),
`decoder(ask)`, a `case` for the laws, and a `mutant` that they catch; one that needs a source has an `EXAMPLE` of how
it is named. A user names a decoder as KEY, KEY:SOURCE (a draft model, trained heads), or
KEY:SOURCE+option=value+option=value.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from seriatim.decoding.layers import LayerPlan
from seriatim.decoding.loop import Decider, Proposer
from seriatim.systems.meta import catalogue
from seriatim.systems.meta import load as load_module
from seriatim.systems.system import Sampling

T = TypeVar("T")
Block = int | Sequence[int] | Callable[[int], Sequence[int]]
KEPT: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()  # what decoders have read, by model
LEARNED: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()  # what they have learned from its texts
SPEC = re.compile(r"(?P<key>[^:+]+)(:(?P<source>.*?))?(?P<options>(\+[a-z_]+=[^+]*)*)")


@dataclass(frozen=True)
class Decoding:
    """A way to decode: who decides, who proposes, and (`target`) further arguments of the `Target` that is sampled.
    Parts have state, so this serves one generation. block: tokens that are decided together, or of each block in turn,
    or what these lengths are for so many tokens, where the order leaves it open (None: as the system has it)."""

    decider: Decider
    proposer: Proposer | None = None
    target: Mapping[str, Any] = field(default_factory=dict)
    block: Block | None = None


Onlooker = Callable[[Decoding], Decoding]  # takes a way to decode, and gives it back with an eye on it


@dataclass(frozen=True)
class Ask:
    """What a decoder is made for: a model, how it is sampled, ids that end a row, where a draft part is, and
    the decoder's options."""

    system: Any
    sampling: Sampling
    stop: tuple[int, ...]
    source: str | None
    options: Any

    @property
    def vocab(self) -> int:
        """How many ids the model knows. Raises ValueError for one that reads out something else."""
        vocab = getattr(self.system.model.heads["token"], "vocab", None)
        if vocab is None:
            raise ValueError(f"{self.system.meta.key} does not say how many ids it knows")
        return vocab

    @property
    def own_blocks(self) -> int | None:
        """How many tokens the model decides together, whoever decodes it; None where a decoder may choose."""
        return getattr(self.system.model.factorization, "size", None)

    def learned(self, make: Callable[[], T]) -> T:
        """What this decoder, with this source and these options, learns from one generation to the next, for as long as
        the model lives: made at first. It may change how fast the model writes, never what."""
        learned = LEARNED.setdefault(self.system.model, {})
        key = (type(self.options), self.source, self.options)
        if key not in learned:
            learned[key] = make()
        return learned[key]

    def no_source(self) -> None:
        """Refuse a source, for decoders that take none."""
        if self.source is not None:
            raise ValueError(f"this decoder needs no other model or heads, and {self.source!r} was given")

    def draft_model(self, translate: bool = False) -> Any:
        """The language model that the source names, as a draft for this one (`systems.draft_model`). Raises ValueError,
        OSError where it is none, or of another tokenizer unless it is to `translate`."""
        from seriatim.systems.draft_model import draft_model

        if self.source is None:
            raise ValueError("name a small model of the same vocabulary behind the decoder, as in NAME:zoo:text-draft")
        return draft_model(self.source, self.system, translate)

    def fits(self, name: str, tokens: int) -> int:
        """An option that counts tokens that are drafted ahead. Raises ValueError where there are none, or more than the
        model takes."""
        most = self.system.model.layout.size - 1
        if not 1 <= tokens <= most:
            raise ValueError(f"{name} is at least 1 and at most {most:,}, one less than the model takes; got {tokens}")
        return tokens


def with_layers(ask: Ask, layers: LayerPlan, draft: str | None) -> Decoding:
    """The model with fewer layers, sampled token by token, or drafted for and verified by another decoder (`draft`: its
    name). Raises ValueError where that one skips layers, too."""
    way = decoder_of(ask.system, str(draft or "ancestral"), ask.sampling, ask.stop)
    if "layers" in way.target:
        raise ValueError(f"{draft} leaves out layers itself: draft with a decoder that leaves the law as it is")
    return replace(way, target={**way.target, "layers": layers})


def forget(system: Any) -> None:
    """Let all decoders of a model begin afresh: on prompts that they saw before, what they learned flatters them."""
    LEARNED.pop(system.model, None)


FAMILIES = ("decoder", "unmasking")  # of next-token models, and of models of tokens in any order


def decoder_names(family: str | None = None) -> tuple[str, ...]:
    """Keys of the decoders of a family, or of all; then "own", each system's, is the first."""
    if family is not None:
        return tuple(key for key, (meta, _) in catalogue().items() if meta.family == family)
    return ("own", *(key for one in FAMILIES for key in decoder_names(one)))


def example_of(key: str) -> str:
    """How a decoder is named on a small model: its file's `EXAMPLE` where it needs a source, else its key."""
    return getattr(load_module(key), "EXAMPLE", key)


def named(spec: str) -> tuple[str, str | None, dict[str, Any]]:
    """Key, source and options of KEY:SOURCE+option=value. Raises ValueError for a key that does not exist, with those
    that are near."""
    found = SPEC.fullmatch(spec)
    key = found["key"] if found else spec
    if key not in decoder_names():
        near = difflib.get_close_matches(key, decoder_names(), 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"there is no decoder {key!r}{hint} There are {', '.join(decoder_names())}")
    assert found is not None
    pairs = (pair.partition("=") for pair in found["options"].split("+")[1:])
    return key, found["source"] or None, {name: _value(text) for name, _, text in pairs}


def is_relaxed(spec: str) -> bool:
    """Whether a decoder may write something else than plain decoding, by its card or by its options."""
    key, _, given = named(spec)
    return catalogue()[key][0].likelihood == "relaxed" or getattr(options_of(key, given), "relaxed", False)


def _value(text: str) -> Any:
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def options_of(key: str, given: Mapping[str, Any]) -> Any:
    """The `Options` of a decoder. Raises ValueError for one that does not exist, or of another type than its default's
    or its annotation's."""
    cls = load_module(key).Options
    known = {f.name: f for f in fields(cls)}
    given = {k: "none" if v is None and k in known and known[k].type == "str" else v for k, v in given.items()}
    for name, value in given.items():
        if name not in known:
            hint = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{key} has no option {name!r}; {hint}")
        wanted = known[name].default
        if value is None and "None" in str(known[name].type):
            continue
        number = isinstance(wanted, int | float) and not isinstance(wanted, bool)
        fits = isinstance(value, int | float) if number else wanted is None or isinstance(value, type(wanted))
        if not fits or (number and isinstance(value, bool)) or (isinstance(wanted, int) and isinstance(value, float)):
            raise ValueError(f"option {name} of {key} is a {type(wanted).__name__}, got {value!r}")
    return cls(**given)


def decoder_of(system: Any, spec: str | Decoding, sampling: Sampling, stop: tuple[int, ...] | None = None) -> Decoding:
    """A way to decode, by name: "own" is the system's, the others work with every next-token model. stop: ids that end
    a row (None: the end of text of its tokenizer). Raises ValueError for what does not exist or does not suit."""
    if isinstance(spec, Decoding):
        return spec
    key, source, given = named(spec)
    if key == "own":
        return Decoding(system.decider(sampling), system.proposer(sampling))
    order, family = system.model.factorization, catalogue()[key][0].family
    if not (order.free if family == "unmasking" else order.draftable):
        wanted = "a model of tokens in any order" if family == "unmasking" else "a next-token model"
        fitting = [one for one in FAMILIES if (order.free if one == "unmasking" else order.draftable)]
        there = ", ".join(("own", *(name for one in fitting for name in decoder_names(one))))
        raise ValueError(f"--decoder {key} needs {wanted}; for {system.meta.key} there are {there}")
    ask = Ask(system, sampling, system.stop if stop is None else tuple(stop), source, options_of(key, given))
    try:
        return load_module(key).decoder(ask)
    except ValueError as error:
        raise ValueError(f"decoder {key}: {error}") from None
