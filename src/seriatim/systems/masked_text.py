"""Systems of text whose tokens are decided in any order, of the whole text or of a block: masked diffusion and kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.data.base import Pairs
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import Decider
from seriatim.decoding.sample import Above, Select
from seriatim.decoding.target import Branch
from seriatim.decoding.unmask import Unmask
from seriatim.factorization.static import Blocks
from seriatim.layout import line
from seriatim.random import Generator
from seriatim.systems.decoders import Block
from seriatim.systems.infill import Parts
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import Answered, TextSystem

AT_ONCE = 32  # draws of a forward


class MaskedText(TextSystem):
    """Decoded by `Unmask`. The config has `rule`, and may have a `threshold`; or by any decoder of the family
    "unmasking"."""

    fills = "known"

    def answered(self, side: Pairs) -> Answered:
        plain = super().answered(side)
        if not side.fill:
            return plain
        longest = max(len(plain.ids(i)[1]) for i in range(len(side)))  # ends of text fill what is left
        return replace(plain, fill=longest)

    def _settled(self, canvas: Canvas, start: int = 0) -> list[int]:
        ids = super()._settled(canvas, start)
        ends = [i for i, x in enumerate(ids) if x in self.stop]
        if ends and (not canvas.done or ends == [len(ids) - 1]):  # what stands behind an end may yet go
            return ids[: ends[0]]
        return ids

    @property
    def mask(self) -> int | None:
        """The id that stands for what is not known, where there is one."""
        return None if self.tokenizer is None else self.tokenizer.special.get("mask")

    def begun(self, ids: Sequence[int], length: int | None) -> Canvas:
        """As of all text. Raises ValueError where the mask itself stands in the prompt."""
        self._refuse_mask(ids)
        return super().begun(ids, length)

    def _refuse_mask(self, ids: Sequence[int]) -> None:
        if self.mask is not None and self.mask in ids:
            raise ValueError(
                f"token {list(ids).index(self.mask)} of the text is the mask itself (id {self.mask}), which stands for "
                "what is not known yet: a gap that is to be filled is written as --infix 'such a <mask:3> here'"
            )

    def gapped(self, parts: Parts) -> Canvas:
        """As of all text. Raises ValueError where the mask itself stands in the text, and where a text behind a gap
        lies in a later block of a model that writes block after block: it would not be seen."""
        canvas, order = super().gapped(parts), self.model.factorization
        self._refuse_mask(canvas.value["token"][0, canvas.known[0]].tolist())
        if not isinstance(order, Blocks):
            return canvas
        block, asked = torch.arange(canvas.layout.size) // order.size, canvas.open[0]
        unseen = (~asked & (block > int(block[asked].min()))).nonzero()
        if len(unseen):
            raise ValueError(
                f"{self.meta.key} writes blocks of {order.size} tokens one after another, and sees nothing behind a "
                f"block: the gap at token {int(asked.nonzero()[0])} would be filled without regard to the text from "
                f"token {int(unseen[0])} on. Let the text end in the block of its gap, or take a system that sees all "
                "of it, such as zoo:text-mdlm"
            )
        return canvas

    def guidance(self, sampling: Sampling) -> Sequence[Branch] | None:
        """Away from what it would write without the prompt, whose tokens stand as masks but for those that are kept
        (LLaDA)."""
        if not sampling.guidance:
            if sampling.keep_tokens:
                raise ValueError("kept tokens are those of the prompt that guidance does not hide: give guidance, too")
            return None
        return (Branch(Guidance(sampling.guidance), hide="given", keep=sampling.keep_tokens),)

    def decider(self, sampling: Sampling) -> Decider:
        sure = None if sampling.steps else getattr(self.config, "threshold", None)
        commit = None if sure is None else Above(sure)
        return Unmask(Select(self.config.rule, sampling.steps or self.model.layout.size, commit=commit), self.stop)

    @torch.inference_mode()
    def bound(self, ids: Sequence[int], given: int = 0, draws: int = 128, seed: int = 0) -> float:
        """An upper bound on the surprise, in nats, of the tokens behind the first `given` ones, by so many draws of
        what is hidden, whose counts are spread evenly (LLaDA's evaluation). Raises ValueError where there are none of
        either, or more tokens than the model takes."""
        most = self.model.layout.size
        if not 0 <= given < len(ids) <= most:
            raise ValueError(f"{given} of {len(ids)} tokens are given: at least one is scored, and {most} fit")
        if draws < 1:
            raise ValueError(f"a bound is taken by at least 1 draw, got {draws}")
        was, nats = self.training, 0.0
        self.eval()
        for start in range(0, draws, AT_ONCE):
            rows = min(AT_ONCE, draws - start)
            value = torch.tensor([list(ids)], device=self.model.device).expand(rows, -1)
            canvas = self.model.canvas({"token": value}, given, layout=line(len(ids)))
            nats += float(self.model.losses(canvas, random=Generator(seed + start)).double().sum())
        self.train(was)
        return nats / draws

    def blocked(self, canvas: Canvas, block: Block) -> Canvas:
        """As of all texts; where the model has blocks of its own, in parts of them, of `block` tokens each."""
        size, start = canvas.layout.size, canvas.given_length
        order = self.model.factorization
        own = getattr(order, "size", None)
        if isinstance(order, Blocks):
            if not isinstance(block, int) or not 1 <= block <= order.size or order.size % block:
                raise ValueError(
                    f"this model was trained to decide blocks of {own} tokens, and takes parts that fill one; got "
                    f"{block}: leave the block out"
                )
            return ranked(canvas, in_parts(size, order.size, block, order.shift))
        if own is not None:
            if block != own:
                raise ValueError(f"this model was trained to decide blocks of {own} tokens; leave the block out")
            return canvas
        if callable(block):
            block = block(size - start)
        lengths = [block] * -(-(size - start) // block) if isinstance(block, int) and block > 0 else block
        if isinstance(lengths, int) or min(lengths, default=0) < 1 or sum(lengths) < size - start:
            raise ValueError(f"blocks hold at least 1 token, and {size - start} in all; got {block}")
        last = torch.tensor(lengths).cumsum(0)
        return ranked(canvas, torch.searchsorted(last, (torch.arange(size) - start).clamp(min=0), right=True))


def in_parts(size: int, block: int, part: int, shift: bool = False) -> Int[Tensor, "E"]:
    """When each of `size` tokens is decided: block after block, and of a block part after part. shift: what the end of
    a block says of the next one is decided first, and alone."""
    place = torch.arange(size)
    inside = place % block
    turn = torch.where(inside > 0, inside // part + 1, 0) if shift else inside // part
    return (place // block * (block + 1) + turn).unique(return_inverse=True)[1]


def ranked(canvas: Canvas, rank: Int[Tensor, "E"]) -> Canvas:
    """The same canvas, decided in another order."""
    new = Canvas(canvas.layout, canvas.value, canvas.known, rank[None], row=canvas.row)
    new.given_length = canvas.given_length
    return new
