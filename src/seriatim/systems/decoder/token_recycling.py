"""Token recycling: the candidates that were not chosen are kept, and are the draft of another time.

New: no draft model, no datastore and no training. A matrix of the likeliest few tokens behind every token, less than
2 MB, is rewritten by every row of every forward, rejected nodes included; a static tree is filled from it depth by
depth and verified in one forward (Luo et al. 2024). The matrix goes on from one text to the next ("hot start").

Here the tree has 12 nodes unless it is told otherwise, the ones of the released 80 that stand most often: on a
processor 80 rows cost more than they bring. Tokens are drawn and matched, so it is exact at every temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

from seriatim.decoding.recycle import Adjacency, Recycler
from seriatim.decoding.templates import standard
from seriatim.decoding.verify import Walk
from seriatim.laws.decoders import DecoderCase, credulous
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.trials import tokens_per_forward

META = Meta(
    key="token-recycling",
    title="Token recycling",
    family="decoder",
    modality="text",
    paper="Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling (2024), "
    "arXiv 2408.08696",
    likelihood="lossless",
    summary="Drafts a tree from a matrix of the candidates that were seen behind each token; nothing is trained.",
)


@dataclass(frozen=True)
class Options:
    """nodes: of the tree, up to the released 80; width: candidates that are kept behind each token; hot: go on
    with what earlier generations of this model have left; prompt: recycle the rows of the prompt too, which reads it
    out once."""

    nodes: int = 12
    width: int = 8
    hot: bool = True
    prompt: bool = False


def decoder(ask: Ask) -> Decoding:
    """Fill a tree, then sample and match."""
    ask.no_source()
    o = ask.options

    def cold() -> Adjacency:
        return Adjacency(ask.vocab, o.width)

    matrix = ask.learned(cold) if o.hot else cold()
    return Decoding(Walk(ask.stop), Recycler(matrix, standard(o.nodes), o.prompt))


def _trial(decoder: str) -> Trial:
    """On many short texts: what is easy to draft differs more from text to text than from decoder to decoder."""
    return Trial("zoo:text-base", tokens_per_forward(decoder, prompts=96, new_tokens=96))


CLAIM = Claim(
    text="Recycled candidates give more tokens a forward than lookup of what stood in the text before.",
    paper="2.73 tokens a forward, prompt lookup 1.75 (Vicuna-7B on Spec-Bench, A100)",
    metric="tokens_per_forward",
    arms={
        "token-recycling": _trial("token-recycling"),
        "80 nodes": _trial("token-recycling+nodes=80"),
        "cold": _trial("token-recycling+hot=false"),
        "prompt recycled": _trial("token-recycling+prompt=true"),
        "prompt-lookup": _trial("prompt-lookup"),
    },
    ours="token-recycling",
    baseline="prompt-lookup",
    better="higher",
)


def case() -> DecoderCase:
    """For the laws."""
    return DecoderCase(decoder, Options(nodes=6))


def mutant() -> DecoderCase:
    """Accepts whatever is drafted."""
    return DecoderCase(credulous, Options())
