"""Fast-dLLM: masked models with a cache, and many tokens at once where they are sure.

New: in a block, what lies outside it is computed once, at the block's first forward, and read as it was from then on
(all before it: prefix; all behind it, too: dual), although everybody sees everybody; and all tokens above a threshold
are decided together, which is safe where the model is sure enough, or as many as a factor allows (Wu et al. 2025). Of a
model that decides in blocks anyway the prefix cache is exact, and is there already; smaller blocks are parts of its own
ones, decided one after another, and of a block the dual cache computes the part at work only (Fast-dLLM v2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from seriatim.decoding.policy import InsideBlock, OutsideBlock
from seriatim.decoding.unmask import Unmask
from seriatim.laws.unmasking import UnmaskingCase, careless
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.unmasking.unmask import commit_of, selected

META = Meta(
    key="fast-dllm",
    title="Fast-dLLM",
    family="unmasking",
    modality="text",
    paper="Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding (2025), "
    "arXiv 2505.22618",
    likelihood="relaxed",
    summary="What lies outside the block at work is computed once a block; sure tokens are decided together.",
)


@dataclass(frozen=True)
class Options:
    """cache: "prefix", "dual" or "none"; block: tokens that are decided together (a model of blocks has its own, with
    an exact cache, and takes parts of them); threshold: above which confidence (None: one at a time), unless a `factor`
    is given. Neutral: no cache, no threshold."""

    cache: str = "dual"
    block: int = 32
    threshold: float | None = 0.9
    factor: float | None = None
    rule: str = "confidence"


def decoder(ask: Ask) -> Decoding:
    """Blocks with a cache around them."""
    ask.no_source()
    o = ask.options
    if o.cache not in ("none", "prefix", "dual"):
        raise ValueError(f"cache is none, prefix or dual, got {o.cache!r}")
    commit = commit_of(o if o.factor is None else replace(o, threshold=None))
    way = Unmask(selected(ask, o.rule, commit), ask.stop)
    if ask.own_blocks and o.block >= ask.own_blocks:
        return Decoding(way)
    if ask.own_blocks:
        policy = {"policy": InsideBlock(ask.own_blocks, o.block)} if o.cache == "dual" else {}
        return Decoding(way, target=policy, block=o.block)
    cache = {} if o.cache == "none" else {"policy": OutsideBlock(o.cache == "dual")}
    return Decoding(way, target=cache, block=o.block)


def case() -> UnmaskingCase:
    """For the laws."""
    return UnmaskingCase(decoder, Options(block=4, threshold=0.4), neutral=Options("none", 4, None))


def mutant() -> UnmaskingCase:
    """Decides whatever, at random."""
    return UnmaskingCase(careless, Options(), neutral=Options(block=4))
