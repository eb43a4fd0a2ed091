"""Pictures as a line of ids whose groups are the steps of a diffusion: the sequential tokenizer of D-AR.

Source: D-AR (Gao & Shou 2025, arXiv 2505.23660, section 3.1) and its code. Causal queries over the patches of a picture
say N codes (`queries.py`); a causal transformer makes condition vectors of them; a flow over pixels is told, in each of
G slices of its time, the vectors of one group of N / G alone. So the first ids decide what a picture is at high noise,
the last ones its finish, and a picture can be drawn while its ids come in, a step a group.

Pictures are .6 times as large there as noise, as in the code. Ours: no features of another network are matched (REPA),
layers are not gated by learned vectors that begin at zero, and the codebook is filled and revived as elsewhere here.
Decoding begins with the same noise for all pictures, so that what ids decode to depends on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.steered import Steered
from seriatim.backbones.transformer import Transformer
from seriatim.factorization.line import LinePlan, LineShape
from seriatim.tokenizers.base import check_codes, check_pictures
from seriatim.tokenizers.codebook import CodebookConfig
from seriatim.tokenizers.losses import LossConfig, PictureLoss
from seriatim.tokenizers.quantizers import NormalizedVQ, Quantized
from seriatim.tokenizers.queries import (
    LookingAtAll,
    QueryEncoder,
    axial,
    from_patches,
    looking,
    raster,
    to_patches,
    vit,
)
from seriatim.tokenizers.vq import CodedTokenizer
from seriatim.view import full


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(LossConfig, CodebookConfig):
    """The shape of a tokenizer and how it is trained; the defaults suit 32x32 glyphs (32 ids of 256, in 8 groups).

    groups: of the ids, each a slice of the time of the flow, and a step of decoding; patch: side of the encoder's
    patches; width, heads: of all three networks; depth, read_depth, flow_depth: layers of the encoder, of what reads
    the codes, and of the flow; flow_patch: side of the patches that the flow moves; deviation: by what pictures are
    multiplied where noise has 1; shift: of time towards noise, t / (t + shift (1 - t)). The error is that of the
    velocity; a perceptual distance and a critic see the picture that a single step would give.
    """

    side: int = 32
    channels: int = 1
    vocab: int = 256
    dim: int = 8
    beta: float = 0.25
    queries: int = 32
    groups: int = 8
    patch: int = 4
    width: int = 128
    heads: int = 4
    depth: int = 3
    read_depth: int = 2
    flow_depth: int = 4
    flow_patch: int = 4
    rank: int = 8
    deviation: float = 0.6
    shift: float = 2.0

    def __post_init__(self) -> None:
        self.check_codebook()
        self.check_loss()
        sizes = ("side", "channels", "vocab", "dim", "queries", "groups", "patch", "width", "heads", "depth")
        for name in (*sizes, "read_depth", "flow_depth", "flow_patch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.queries % self.groups:
            raise ValueError(f"{self.queries} ids cannot be cut into {self.groups} equal groups")
        for name in ("patch", "flow_patch"):
            if self.side % getattr(self, name):
                raise ValueError(f"{name}: squares of {getattr(self, name)} pixels do not tile a side of {self.side}")
        if not self.deviation > 0 or not self.shift > 0:
            raise ValueError(f"deviation and shift are positive, got {self.deviation} and {self.shift}")
        axial(self.width, self.heads)

    @classmethod
    def for_pictures(cls, side: int, channels: int, **changes: object) -> SequentialConfig:
        """A config for square pictures of this size: 8x8 patches up to 64 pixels; from 128 on the published shape (256
        ids of 16,384 in 8 groups, patches of 16 pixels in the encoder and 8 in the flow)."""
        shape: dict[str, object] = {"patch": max(1, side // 8), "flow_patch": max(1, side // 8)}
        if side >= 128:
            shape = dict(
                vocab=16384, queries=256, patch=16, width=768, heads=12, depth=8, read_depth=8, flow_depth=12,
                flow_patch=8, warm_up=0.05, vq_weight=1.0, perceptual=0.5,
            )  # fmt: skip
        elif side % 8 and side > 8:
            raise ValueError(f"pictures of {side} pixels are not cut into 8x8 patches: resize them to a multiple of 8")
        return cls(**{"side": side, "channels": channels, **shape, **changes})  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """Ids of a group."""
        return self.queries // self.groups


class Flow(nn.Module):
    """The velocity of noisy pictures, told a time and the condition vectors of one group."""

    def __init__(self, c: SequentialConfig):
        super().__init__()
        self.patch, self.grid = c.flow_patch, c.side // c.flow_patch
        pixels = c.channels * c.flow_patch**2
        self.from_patch, self.told = nn.Linear(pixels, c.width), nn.Linear(c.width, c.width)
        rope = axial(c.width, c.heads)
        self.net = Steered(vit(c.width, c.flow_depth, c.heads, rope=rope, vector=c.width, last_norm=False))
        self.to_patch = nn.Linear(c.width, pixels)
        nn.init.zeros_(self.to_patch.weight)
        nn.init.zeros_(self.to_patch.bias)
        self.plan = looking(full(self.grid**2), raster(self.grid), LookingAtAll)

    @property
    def last(self) -> nn.Parameter:
        """The weight that draws the pixels."""
        return self.to_patch.get_parameter("weight")

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, " b"], condition: Float[Tensor, "b m d"]
    ) -> Float[Tensor, "b c h w"]:
        h = self.net(self.from_patch(to_patches(x, self.patch)), self.plan, time, self.told(condition))
        return from_patches(self.to_patch(h), self.patch, self.grid)


class SequentialTokenizer(CodedTokenizer):
    """Pictures in [-1, 1] <-> a line of ids, whose groups are drawn one after another."""

    kind: ClassVar[str] = "sequential"
    config: SequentialConfig
    noise: Tensor

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        self.config = c = config
        turn, rope = torch.arange(c.queries), axial(c.width, c.heads)
        net = vit(c.width, c.depth, c.heads, rope=rope)
        self.encoder = QueryEncoder(c.channels, c.side, c.patch, net, turn, c.dim, c.rank)
        self.quantizer = NormalizedVQ(c.vocab, c.dim, c.beta)
        self.from_code = nn.Linear(c.dim, c.width, bias=False)
        self.place = nn.Parameter(torch.randn(c.queries, c.width) * 0.02)
        self.reader = Transformer(vit(c.width, c.read_depth, c.heads))
        self.decoder = Flow(c)
        self.picture_loss = PictureLoss(c, c.channels, c.side)
        self._count_from_now()
        seeded = torch.Generator().manual_seed(0)
        self.register_buffer("noise", torch.randn(1, c.channels, c.side, c.side, generator=seeded), persistent=False)
        self._line = LinePlan(LineShape(c.queries, 0, None), 0, 0, c.queries)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups, and ids of each."""
        return self.config.groups, self.config.size

    # ---- codes ------------------------------------------------------------------------------------------------------

    def latents(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """What is quantized."""
        check_pictures(images, self.channels, self.side)
        return self.encoder(images)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        return self.quantizer.quantize(self.latents(images)).ids

    def conditions(self, codes: Float[Tensor, "b n d"]) -> Float[Tensor, "b n w"]:
        """The condition vectors of all ids, each of its own code and those before it."""
        return self.reader(self.from_code(codes) + self.place, self._line)

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def time(self, share: Tensor) -> Tensor:
        """Shifted towards noise: less of it is gone at a share of the steps."""
        return share / (share + self.config.shift * (1 - share))

    def group_at(self, share: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The group that is told at a share of the time: group g within half a slice around g / groups."""
        groups = self.config.groups
        return (share * groups + 0.5).floor().long().clamp(max=groups - 1)

    def draw(self, codes: Float[Tensor, "b n d"], noise: Tensor | None = None) -> Float[Tensor, "b c h w"]:
        """The picture of quantized latents, not clamped."""
        condition, drawing = self.conditions(codes), Drawing(self, len(codes), noise)
        for told in condition.split(self.config.size, 1):
            drawing.go_on(told)
        return drawing.picture

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Quantized]:
        """Reconstruction (not clamped) and what the quantizer did."""
        quantized = self.quantizer.quantize(self.latents(images))
        return self.draw(quantized.z_q), quantized

    @torch.no_grad()
    def decode(self, ids: Int[Tensor, "b n"], noise: Tensor | None = None) -> Float[Tensor, "b c h w"]:
        """noise: (b, c, h, w) to begin with (None: the same for all)."""
        check_codes(ids, (self.config.queries,), self.vocab)
        return self.draw(self.quantizer.decode_ids(ids), noise).clamp(-1, 1)

    @torch.no_grad()
    def previews(self, ids: Int[Tensor, "b n"], noise: Tensor | None = None) -> list[Float[Tensor, "b c h w"]]:
        """What the picture will be, after each of the groups that are there; `ids` may end after any group."""
        stream = Stream(self, len(ids), noise)
        return [stream.push(part) for part in ids.split(self.config.size, 1)]

    # ---- training ---------------------------------------------------------------------------------------------------

    def loss(
        self, images: Float[Tensor, "b c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """As `PictureTokenizer.loss`: each picture at a time of its own, told the group of that time. Ids behind that
        group do not count."""
        c, latents = self.config, self.latents(images)
        share = torch.rand(len(images), generator=generator, device=generator.device).to(images)
        group = self.group_at(share)
        counts = torch.arange(c.queries, device=group.device) // c.size <= group[:, None]
        z, cost, said = self.coded(latents, step, steps, generator, weight=counts.to(latents))
        told = self.conditions(z).unflatten(1, self.grid)[torch.arange(len(images), device=group.device), group]
        noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
        time = self.time(share)
        t, clean = time[:, None, None, None], c.deviation * images
        x = torch.lerp(noise, clean, t)
        velocity = self.decoder(x, time, told)
        error = (velocity.float() - (clean - noise)).square().mean() / c.deviation**2
        estimate = (x + (1 - t) * velocity.float()) / c.deviation
        loss, figures = self.picture_loss(estimate, images, self.decoder.last, step, steps, error)
        loss = loss + cost
        return loss, {"loss": loss.item(), "velocity_error": error.item(), **figures, **said}


def adams_bashforth(now: Tensor, before: Tensor | None) -> Tensor:
    """The velocity of a step of the two-step method of Adams and Bashforth, from the one here and that of the step
    before; Euler's where there was none. Of second order for steps of one length."""
    return now if before is None else 1.5 * now - 0.5 * before


class Drawing:
    """Pictures on their way from noise: one step of the flow a group. `done`: how many steps were made."""

    def __init__(self, tokenizer: SequentialTokenizer, count: int, noise: Float[Tensor, "b c h w"] | None = None):
        c = tokenizer.config
        if noise is not None and tuple(noise.shape) != (count, c.channels, c.side, c.side):
            raise ValueError(
                f"noise of {count} pictures is {(count, c.channels, c.side, c.side)}, got {tuple(noise.shape)}"
            )
        self.tokenizer, self.done = tokenizer, 0
        self._x = tokenizer.noise.expand(count, -1, -1, -1) if noise is None else noise
        self._before: Tensor | None = None

    def go_on(self, told: Float[Tensor, "b m w"]) -> Float[Tensor, "b c h w"]:
        """One step, told the vectors of the next group; what the picture will be, by the velocity here."""
        t, c = self.tokenizer, self.tokenizer.config
        if self.done == c.groups:
            raise ValueError(f"all {c.groups} groups are drawn")
        now, then = t.time(
            torch.tensor([self.done / c.groups, (self.done + 1) / c.groups], dtype=torch.float64)
        ).tolist()
        velocity = t.decoder(self._x, torch.full((len(told),), now, device=told.device), told)
        preview = (self._x + (1 - now) * velocity) / c.deviation
        self._x = self._x + (then - now) * adams_bashforth(velocity, self._before)
        self._before, self.done = velocity, self.done + 1
        return preview

    @property
    def picture(self) -> Float[Tensor, "b c h w"]:
        """What stands there, not clamped: the picture, when all groups are drawn."""
        return self._x / self.tokenizer.config.deviation


class Stream:
    """Pictures that are drawn while their ids come in, a group at a time; what is known later changes nothing."""

    def __init__(self, tokenizer: SequentialTokenizer, count: int, noise: Float[Tensor, "b c h w"] | None = None):
        self.tokenizer, self._drawing = tokenizer, Drawing(tokenizer, count, noise)
        self._ids = torch.zeros(count, tokenizer.config.queries, dtype=torch.long)

    @torch.no_grad()
    def push(self, ids: Int[Tensor, "b m"]) -> Float[Tensor, "b c h w"]:
        """The next group of ids; what the picture will be, in [-1, 1]. Raises ValueError for another number of ids."""
        t, size, done = self.tokenizer, self.tokenizer.config.size, self._drawing.done
        check_codes(ids, (size,), t.vocab)
        if done < t.config.groups:
            self._ids[:, done * size : (done + 1) * size] = ids
        told = t.conditions(t.quantizer.decode_ids(self._ids.to(t.place.device)))[:, done * size : (done + 1) * size]
        return self._drawing.go_on(told).clamp(-1, 1)

    @property
    def picture(self) -> Float[Tensor, "b c h w"]:
        """The picture, when all groups have come in, in [-1, 1]."""
        return self._drawing.picture.clamp(-1, 1)
