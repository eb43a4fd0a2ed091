"""Probe `hybrid-vla` (Liu et al. 2025, arXiv 2503.10631): one backbone denoises an action and then writes it as ids.

An instruction is given; a pose (a chunk of action vectors) is denoised in place, all of it at once, behind the
instruction; behind the decided pose its ids are written one by one. The noise is seen by nobody but the pose itself.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Set
from seriatim.decoding.kinds import PerKind
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.solver import SolverStep
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed, VectorEmbed
from seriatim.embed_kinds import ByKind
from seriatim.factorization.base import Factorization
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.in_place import Cosine, Denoised, InPlaceHead, Straight, noised, pure_noise
from seriatim.laws.case import randomise
from seriatim.layout import Layout, Segment, line
from seriatim.model import Model
from seriatim.plan import LEARNED, NOISE, VALUE, OrderError, plan_of
from seriatim.random import Forced, Generator, Keyed
from seriatim.view import INF, timed

WORDS, BINS, WIDTH, TEXT, POSES, DIM, IDS = 4, 3, 16, 3, 2, 2, 3

# ---- the composition -------------------------------------------------------------------------------------------------


class PoseThenIds(Factorization):
    """Slots: text | noise of the pose | the decided pose | a marker, then the ids. The noise is born and dies in its own
    step, so that what follows sees the decided pose only."""

    def order(self, layout, random=None):
        kind = torch.tensor([("text", "pose", "action").index(k) for k in layout.kinds])[layout.kind]
        return torch.where(kind == 2, layout.index + 1, 0)[None]

    def packed(self, canvas):
        text, pose, ids = (canvas.layout.elements(kind).tolist() for kind in ("text", "pose", "action"))
        t, p, n = len(text), len(pose), len(ids)
        carries = [*text, *pose, *pose, -1, *ids[:-1]]
        source = [VALUE] * t + [NOISE] * p + [VALUE] * p + [LEARNED] + [VALUE] * (n - 1)
        at = [*range(t), *[t] * p, *[t + 1] * p, *range(t + 2, t + 2 + n)]
        dies = [INF] * t + [t + 1] * p + [INF] * (p + n)
        place = [*range(t), *range(t, t + p), *range(t, t + p), *range(t + p, t + p + n)]
        rank = canvas.rank[0]
        reads = [(s, e) for s, e in zip([*range(t, t + p), *range(t + 2 * p, t + 2 * p + n)], pose + ids, strict=True)]
        reads = [(s, e) for s, e in reads if rank[e] >= 0]
        coord = [[0, at] if source[i] == LEARNED else [at, at] for i, at in enumerate(place)]
        return plan_of(timed(at, at, dies), rank, carries, reads, source, coord=coord, layout=canvas.layout)


def hybrid_vla(layout, path=None, predicts="noise"):
    embeds = {
        "text": TokenEmbed(WORDS, WIDTH, "text", start=False),
        "pose": VectorEmbed(DIM, WIDTH, "pose", noise=True, start=False),
        "action": TokenEmbed(BINS, WIDTH, "action", start=False),
    }
    heads = {"pose": InPlaceHead(WIDTH, DIM, path, predicts), "action": CategoricalHead(WIDTH, BINS)}
    backbone = Transformer(TransformerConfig(WIDTH, 3, 2, rope=RoPE(axes=(0, WIDTH // 2))))
    return Model(layout, PoseThenIds(), ByKind(embeds, WIDTH, learned=1), backbone, heads)


LAYOUT = Layout(
    (
        *line(TEXT, "text", given=True).segments,
        *line(POSES, "pose").segments,
        Segment("action", torch.arange(IDS)[:, None], same_as="pose"),
    )
)
