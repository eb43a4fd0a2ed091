"""Pictures as a line of latents: learned queries look at the patches of a picture, each in its turn.

One transformer over [patches; queries], as in TiTok (Yu et al. 2024, arXiv 2406.07550). Patches see each other and no
query; a query sees all patches, and the queries whose turn is not after its own: so what it says stays the same when
later queries are left out, and any prefix of the latents is a coarser coding of the picture. D-AR and DetailFlow rest
on it. The same lifetimes that order generation say who sees whom here (`view.inclusive`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer
from seriatim.plan import DERIVED, Plan, Reads, Slots
from seriatim.tokenizers.conv import map_to_rows, rows_to_map
from seriatim.view import View, inclusive

EPS = 1e-6


class Looking(Plan):
    """A forward that generates nothing: slots that are fed vectors, and who sees whom."""


class LookingAtAll(Looking):
    """The same where everybody sees everybody."""

    def attention(self, view: str, cache) -> None:  # type: ignore[no-untyped-def]
        return None


def looking(view: View, coord: Int[Tensor, "s axes"] | None = None, kind: type[Plan] = Looking) -> Plan:
    """The plan of such a forward; coord: of the slots, for rotary positions."""
    n, nothing = view.size, torch.full((1, view.size), -1)
    coord = torch.arange(n)[:, None] if coord is None else coord
    slots = Slots(nothing[..., None], torch.full((1, n), DERIVED), coord[None], nothing)
    none = torch.zeros(1, 0, dtype=torch.long)
    return kind(slots, {"all": view}, Reads(none, none), none)


def vit(width: int, depth: int, heads: int, **choices: object) -> TransformerConfig:
    """A vision transformer's layers: layer norms, biases, plain feed-forward networks, normalised queries and keys."""
    said = {"norm": "layer", "activation": "silu", "bias": True, "qk_norm": "layer", "eps": EPS, **choices}
    return TransformerConfig(width, depth, heads, **said)  # type: ignore[arg-type]


def axial(width: int, heads: int) -> RoPE:
    """Rotary positions by row and column, half of a head each. Raises ValueError where a head is not divided so."""
    if width % heads or (width // heads) % 4:
        raise ValueError(f"rows and columns share a head, whose width is a multiple of 4: not {width} / {heads}")
    half = width // heads // 2
    return RoPE(axes=(half, half))


def to_patches(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n p"]:
    """Squares of pixels as rows, in raster order."""
    return map_to_rows(F.pixel_unshuffle(images, patch))


def from_patches(rows: Float[Tensor, "b n p"], patch: int, side: int) -> Float[Tensor, "b c h w"]:
    """The inverse; side: patches in a row."""
    return F.pixel_shuffle(rows_to_map(rows, (side, side)), patch)


def raster(side: int) -> Int[Tensor, "n 2"]:
    """Row and column of the places of a square."""
    place = torch.arange(side)
    return torch.cartesian_prod(place, place).view(-1, 2)


class QueryEncoder(nn.Module):
    """Square pictures -> one latent of `dim` numbers for each query.

    turn: of each query, from 0; rank: the queries are `rank` numbers each behind a linear map (None: vectors of full
    width); again: it can also say what is to follow a prefix that has been changed (`forward`'s `prefix`), by other
    queries. placed: patches have learned positions in place of a norm, and codes a bias (as SigLIP2 has them).
    """

    def __init__(
        self, channels: int, side: int, patch: int, config: TransformerConfig, turn: Int[Tensor, "n"], dim: int,
        rank: int | None = None, again: bool = False, placed: bool = False,
    ):  # fmt: skip
        super().__init__()
        if side % patch:
            raise ValueError(f"patches of {patch} pixels do not tile a side of {side}")
        width, n, self.patch, self.patches = config.width, len(turn), patch, (side // patch) ** 2
        self.from_patch = nn.Linear(channels * patch * patch, width)
        self.queries = nn.Parameter(torch.randn(n, rank or width) * (1.0 if rank else 0.02))
        self.widen = nn.Linear(rank, width) if rank else nn.Identity()
        self.follow = Follow(n, width, dim) if again else None
        self.net = Transformer(config)
        self.places = nn.Parameter(torch.randn(self.patches, width) * 0.02) if placed else None
        self.to_code = nn.Linear(width, dim, bias=placed)
        nn.init.normal_(self.to_code.weight, std=1 / math.sqrt(width))
        self.plan = query_plan(side // patch, turn)

    def forward(
        self, images: Float[Tensor, "b c h w"], prefix: Float[Tensor, "b k dim"] | None = None
    ) -> Float[Tensor, "b n dim"]:
        """The latents of all queries. With a prefix of codes these stand in the places of the first queries, and the
        latents of the others say what a picture needs behind them (those of the first are of no use)."""
        x = self.from_patch(to_patches(images, self.patch).to(self.from_patch.weight.dtype))
        x = F.layer_norm(x, x.shape[-1:], eps=EPS) if self.places is None else x + self.places
        queries = self.widen(self.queries).expand(len(x), -1, -1)
        if prefix is not None:
            if self.follow is None:
                raise ValueError("this encoder has no queries that follow a prefix: make it with again=True")
            queries = self.follow(prefix.to(x.dtype))
        h = self.net(torch.cat([x, queries], 1), self.plan)
        return self.to_code(h[:, self.patches :])


class Follow(nn.Module):
    """The line of queries behind a prefix of codes: these, widened, and other queries in the places of the rest."""

    def __init__(self, count: int, width: int, dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, width) * 0.02)
        self.place = nn.Parameter(torch.randn(count, width) * 0.02)
        self.from_code = nn.Linear(dim, width)

    def forward(self, prefix: Float[Tensor, "b k dim"]) -> Float[Tensor, "b n d"]:
        rest = self.queries[prefix.shape[1] :].expand(len(prefix), -1, -1)
        return torch.cat([self.from_code(prefix), rest], 1) + self.place


def query_plan(side: int, turn: Int[Tensor, "n"]) -> Plan:
    """side x side patches, then queries in their turns. Queries stand nowhere: rotary positions leave them as they
    are."""
    view = inclusive(torch.cat([torch.zeros(side * side, dtype=torch.long), 1 + turn]))
    return looking(view, torch.cat([raster(side), torch.zeros(len(turn), 2, dtype=torch.long)]))
