"""The decoders of next-token models by name."""

from __future__ import annotations

from typing import Any

from seriatim.decoding.beam import Beam
from seriatim.decoding.draft import NGram
from seriatim.decoding.jacobi import Window
from seriatim.decoding.loop import Decider, Proposer
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.verify import Walk
from seriatim.systems.system import Sampling

DECODERS = ("own", "ancestral", "prompt-lookup", "jacobi", "beam")


def decoder_of(
    system: Any, name: str, sampling: Sampling, stop: tuple[int, ...] | None = None
) -> tuple[Decider, Proposer | None]:
    """Decider and proposer: "own" is the system's, the others work with every next-token model. stop: ids that end a
    row (None: the end of text of its tokenizer). Raises ValueError for a name that does not exist or does not suit."""
    if name not in DECODERS:
        raise ValueError(f"there is no decoder {name!r}; there are {', '.join(DECODERS)}")
    if name == "own":
        return system.decider(sampling), system.proposer(sampling)
    if not system.model.factorization.draftable:
        raise ValueError(f"{system.meta.key} decodes in an order of its own; --decoder {name} needs a next-token model")
    stop = system.stop if stop is None else stop
    if name == "prompt-lookup":
        return Walk(stop), NGram()
    if name == "jacobi":
        return Walk(stop), Window(8)
    return (Beam(4), None) if name == "beam" else (SampleAll(stop), None)
