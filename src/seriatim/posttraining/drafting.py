"""Small networks that draft for a frozen language model: what they are given, how they are trained, kept and loaded.

A draft part (Medusa's heads, Hydra's, EAGLE's layer) reads the states of its base: what stands behind the last norm,
which the base's own head turns into logits. The base is never changed, and its states are computed once for all
trainings on the same text (`states.py`). A part fits the one base it was trained for, which a fingerprint tells.

To read tokens out, parts share the base's matrix by default: at a vocabulary of 49 thousand a matrix of its own would
cost each head as much as a small base. A draft may also leave out rare tokens (`draft_vocab`): what is drafted changes
how much is accepted, and never what is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.quantize import linear
from seriatim.heads.categorical import CategoricalHead
from seriatim.random import Generator
from seriatim.training.checkpoint import load_weights, save_json
from seriatim.training.recipe import Recipe
from seriatim.training.state import write_safely

P = TypeVar("P", bound="Part")
WEIGHTS, CARD = "draft.safetensors", "draft.json"
SAMPLE = 64  # numbers of a tensor that a fingerprint looks at


class Base:
    """A frozen model of text as its parts see it. `system` is the `LanguageModel` itself, or a `MaskedText`, which has
    no `states`.

    Raises ValueError for a model that does not read tokens out by one matrix.
    """

    def __init__(self, system: Any):
        self.system, self.model = system, system.model
        head = dict(self.model.heads.items()).get("token")
        if not isinstance(head, CategoricalHead) or head.roles > 1:
            raise ValueError(f"{system.meta.key} does not read out tokens one by one, so nothing can draft for it")
        self.head, self.width, self.vocab = head, head.width, head.vocab

    @property
    def dtype(self) -> torch.dtype:
        """The number format of its states; of integer weights, that of what is multiplied with them."""
        return next(p.dtype for p in self.model.embed.parameters())

    @property
    def device(self) -> torch.device:
        return self.model.device

    def embed(self, ids: Int[Tensor, "*rest"]) -> Float[Tensor, "*rest d"]:
        """The vectors of tokens as the base reads them."""
        return self.model.embed.vectors(ids)  # type: ignore[operator]

    def logits(self, h: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest v"]:
        """What the base says of the token behind each state."""
        return self.head.logits(h.to(self.dtype))

    def states(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The states of texts: that of token i has seen tokens 0 to i."""
        return self.system.states(ids)

    # ---- which model it is -------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Tells base models apart, by samples of the weights that every number format keeps (embeddings, norms, biases)
        and the vocabulary. The same in float32, bfloat16 and with integer matrices, and with an adapter folded in."""
        return self._digest(self._kept())

    @property
    def sample(self) -> list[float]:
        """A number of each of these weights: float16 rounds to numbers that bfloat16 rounds to others."""
        return [round(float(x.flatten()[x.numel() // 2]), 6) for _, x in sorted(self._kept().items())]

    def is_of(self, card: Mapping[str, Any]) -> bool:
        """Whether this is the base that a card (`card_of`) speaks of."""
        of = card["base"]
        if self.dtype != torch.float16 or of["fingerprint"] == self.fingerprint:
            return of["fingerprint"] == self.fingerprint
        a, b = torch.tensor(self.sample), torch.as_tensor(of.get("sample", ()), dtype=torch.float32)
        return a.shape == b.shape and torch.allclose(a, b, rtol=2**-8, atol=1e-5)

    def _kept(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {n: p.detach() for n, p in named if p.numel() and (p.dim() < 2 or n.startswith("embed."))}

    @cached_property
    def exact_fingerprint(self) -> str:
        """The same of all weights in floating point: adapters change it, and with it what states are."""
        return self._digest({n: x for n, x in self.model.state_dict().items() if x.is_floating_point()})

    def _digest(self, tensors: Mapping[str, Tensor]) -> str:
        said = blake2b(f"{self.vocab} {self.width}".encode(), digest_size=8)
        for name in sorted(tensors):
            x = tensors[name].detach()
            if x.is_floating_point() and x.numel():
                where = torch.linspace(0, x.numel() - 1, min(x.numel(), SAMPLE), dtype=torch.float64).long()
                some = x.flatten()[where.to(x.device)].to("cpu", torch.float32).bfloat16()
                said.update(name.encode() + some.view(torch.int16).numpy().tobytes())
        return said.hexdigest()

    def __str__(self) -> str:
        return f"{self.system.meta.key} of width {self.width} and {self.vocab:,} tokens ({self.fingerprint})"


@dataclass(frozen=True)
class DraftConfig:
    """What every draft part can be asked. own_output: matrices of its own to read tokens out, which begin as the
    base's; draft_vocab: only so many of the tokens that are most frequent in the training text are drafted."""

    own_output: bool = False
    draft_vocab: int | None = None

    def __post_init__(self) -> None:
        if self.draft_vocab is not None and self.draft_vocab < 1:
            raise ValueError(f"draft_vocab is at least 1 token, got {self.draft_vocab}")


class Output(nn.Module):
    """Reads tokens out of a draft's states: by the base's matrix, or by one of its own for each head.

    `ids` are the tokens that are drafted, in ascending order (None: all of them); logits are over these.
    """

    ids: Tensor | None
    shared: CategoricalHead  # the base's own, or its rows of these tokens: no part of this module
    format: torch.dtype  # the base's

    def __init__(self, config: DraftConfig, base: Base, heads: int = 1):
        super().__init__()
        n = config.draft_vocab
        if n is not None and n > base.vocab:
            raise ValueError(f"draft_vocab is {n:,}, and the base has {base.vocab:,} tokens")
        self.own, self.size, self.softcap = config.own_output, n or base.vocab, base.head.softcap
        self.register_buffer("ids", None if n is None else torch.arange(n, device=base.device))
        if self.own:
            self.weight = nn.Parameter(torch.empty(heads, self.size, base.width, device=base.device))
            self.bias = nn.Parameter(torch.zeros(heads, self.size, device=base.device))
        self.read_from(base)
        self.begin()

    def read_from(self, base: Base) -> None:
        """Take the base's matrix, or its rows of the drafted tokens, as they are now."""
        self.__dict__["shared"] = base.head.limited(self.ids)
        self.__dict__["format"] = base.dtype

    @torch.no_grad()
    def begin(self) -> None:
        """Own matrices become the base's, so that every head begins as the base itself."""
        if self.own:
            weight = self.shared.quantized()["weight"]
            self.weight.copy_(linear(torch.eye(self.weight.shape[2], dtype=self.format), weight).T)
            if self.shared.bias is not None:
                self.bias.copy_(self.shared.bias)

    def draft_only(self, base: Base, ids: Int[Tensor, "n"]) -> None:
        """Draft these tokens from now on, as many as there are; before anything is trained."""
        assert self.ids is not None
        self.ids.copy_(ids.sort().values)
        self.read_from(base)
        self.begin()

    def forward(self, x: Float[Tensor, "*rest k d"], first: int = 0) -> Float[Tensor, "*rest k n"]:
        """Logits of the heads `first`, `first` + 1, ... over the drafted tokens: one product for all heads where they
        share the base's matrix."""
        if not self.own:
            return self.shared.logits(x.to(self.format))
        k = x.shape[-2]
        y = torch.einsum("...kd,knd->...kn", x, self.weight[first : first + k]) + self.bias[first : first + k]
        return y if self.softcap is None else torch.tanh(y / self.softcap) * self.softcap

    def taught(self, h: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest n"]:
        """What the base itself says of the drafted tokens behind its states."""
        return self.shared.logits(h.to(self.format))

    def labels(self, ids: Int[Tensor, "*rest"]) -> Int[Tensor, "*rest"]:
        """Tokens as their places among the drafted ones; -1 where they are not drafted."""
        if self.ids is None:
            return ids
        place = torch.searchsorted(self.ids, ids.contiguous()).clamp(max=self.size - 1)
        return torch.where(self.ids[place] == ids, place, -1)

    def tokens(self, place: Int[Tensor, "*rest"]) -> Int[Tensor, "*rest"]:
        """The tokens at these places among the drafted ones."""
        return place if self.ids is None else self.ids[place]

    def best(self, x: Float[Tensor, "*rest k d"], count: int, first: int = 0) -> Int[Tensor, "*rest k c"]:
        """The likeliest tokens of each head, the best first; fewer where fewer are drafted."""
        return self.tokens(self(x, first).topk(min(count, self.size), -1).indices)


CHUNK = 1 << 22  # logits that are held at once


class _Read(torch.autograd.Function):
    """The summed cross-entropy of read-outs, their gradients made piece by piece on the way: logits of a large
    vocabulary are never held for all places at once, and each is made once only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Float[Tensor, "m k d"], output: Output, label: Int[Tensor, "m"], weight: Float[Tensor, "m k"],
        h: Float[Tensor, "m d"] | None, *own: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wanted = [x, *own] if any(ctx.needs_input_grad) else []
        gradients = [torch.zeros_like(w) for w in wanted]
        total, told = x.new_zeros((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
        for rows in torch.arange(len(x), device=x.device).split(max(CHUNK // (x.shape[1] * output.size), 1)):
            piece = x[rows].detach().requires_grad_(bool(wanted))
            with torch.set_grad_enabled(bool(wanted)):
                loss, part = _read(output, piece, label[rows], weight[rows], None if h is None else h[rows])
            if wanted:
                first, *others = torch.autograd.grad(loss, [piece, *own])
                gradients[0][rows] = first
                for kept, more in zip(gradients[1:], others, strict=True):
                    kept += more
            total, told = total + loss.detach(), told + part
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(told)
        return total.to(torch.promote_types(x.dtype, torch.float32)), told

    @staticmethod
    def backward(ctx: Any, *outside: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_x, *of_own = (g * outside[0] for g in ctx.saved_tensors)
        return of_x, None, None, None, None, *of_own


def _read(
    output: Output, x: Float[Tensor, "m k d"], label: Int[Tensor, "m"], weight: Float[Tensor, "m k"],
    h: Float[Tensor, "m d"] | None,
) -> tuple[Tensor, Float[Tensor, "told k"]]:  # fmt: skip
    """The weighted loss of some places, and for each head: nats, labels that are drafted, and where nothing is learned
    labels that were its first choice, and among its first five."""
    logits = output(x)
    said = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    there, place = (weight > 0) & (label >= 0)[:, None], label.clamp(min=0)[:, None, None].expand(-1, x.shape[1], 1)
    right = said.gather(-1, place)
    if h is None:
        nats = -right[..., 0]
    else:
        with torch.no_grad():
            taught = torch.softmax(output.taught(h).to(said.dtype), -1)
        nats = -(taught[:, None] * said).sum(-1)
    nats = torch.where(there, nats, 0)
    with torch.no_grad():
        found = [nats, there]
        if not logits.requires_grad:  # looked at on held-out text only: it costs as much as a third of the product
            rank = (said >= right).to(said.dtype).sum(-1) - 1  # of equals the last: bfloat16 knows many
            found += [there & (rank < 1), there & (rank < 5)]
        told = torch.stack(found).sum(1, dtype=torch.float64)
    return (nats * weight).sum(), told


def losses_ahead(
    output: Output, x: Float[Tensor, "b n k d"], ids: Int[Tensor, "b n"], decay: float = 1.0,
    h: Float[Tensor, "b n d"] | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:  # fmt: skip
    """The loss of heads that look ahead, as `DraftPart.loss` gives it: head i (from 1) reads token t + 1 + i out of
    x[:, t, i - 1], and counts decay^i. Labels are the text, or (`h`, the base's states) what the base says there.

    Figures, by how far ahead a head looks: its loss, and where nothing is learned how often the token is its first
    choice or among its first five. Tokens that are not drafted count as misses there, and are left out of the loss
    (`covered`: the share of those that are).
    """
    (b, n, k, _), ahead = x.shape, torch.arange(1, x.shape[2] + 1, device=x.device)
    if n < k + 2:
        raise ValueError(f"heads that look {k} tokens ahead need windows of at least {k + 2}, got {n}")
    aligned = torch.stack([F.pad(x[:, : n - 1 - i, i - 1], (0, 0, i - 1, 0)) for i in ahead.tolist()], 2)
    there = torch.arange(1, n - 1, device=x.device)[:, None] >= ahead  # by the place that is read out, from the first
    weight = (there * decay ** ahead.to(x.dtype)).expand(b, -1, -1).flatten(0, 1)
    label, taught = output.labels(ids[:, 2:]).flatten(), None if h is None else h[:, 1:-1].flatten(0, 1)
    own = [p for p in output.parameters() if p.requires_grad and torch.is_grad_enabled()]
    total, told = _Read.apply(aligned.flatten(0, 1), output, label, weight, taught, *own)
    count = (weight * (label >= 0)[:, None]).sum()
    figures: dict[str, float] = {}
    for i, (nats, covered, *hits) in enumerate(told.T.tolist()):
        figures[f"loss_{i + 1}"] = nats / max(covered, 1)
        figures |= {f"top{c}_{i + 1}": hit / (b * (n - 2 - i)) for c, hit in zip((1, 5), hits, strict=False)}
    if output.ids is not None:
        figures["covered"] = float((label >= 0).double().mean())
    return total, count, figures


class Part(nn.Module):
    """A part that is trained beside a frozen base, which is no part of it. Subclasses say their `key` and `Config`.

    on_states: it learns from the base's states, which are computed once, and not from runs of the base; free: it stands
    beside models of tokens in any order, not next-token models; reading: how much of a text it reads unless it is told
    (`Reading`). `chance`: of what drafts, how often candidate i at depth d stands, as measured on held-out text (empty:
    it was not)."""

    key: ClassVar[str]
    Config: ClassVar[type]
    on_states: ClassVar[bool] = False
    free: ClassVar[bool] = False
    reading: ClassVar[Mapping[str, int]] = MappingProxyType({})
    chance: tuple[tuple[float, ...], ...] = ()

    def __init__(self, config: Any, base: Base):
        super().__init__()
        self.config = config

    @classmethod
    def made_by(cls) -> str:
        """What a user calls to train one."""
        return f"seriatim train {cls.key} --base MODEL"

    def read_from(self, base: Base) -> None:
        """Take what is the base's own, as it is now."""

    def examples(
        self, base: Base, ids: Int[Tensor, "windows n"], tell: Callable[[int, int], None] | None = None
    ) -> Any:
        """What it learns from, of these windows of a text, where it is not on states; `tell` hears how many of how many
        windows are done."""
        from seriatim.posttraining.states import Tokens

        return Tokens(ids)

    def learner(self, base: Base) -> Any:
        """How it is trained (`training.trainer.Learner`)."""
        raise NotImplementedError


class DraftPart(Part):
    """A trained part that drafts for a base. Subclasses say how they are trained."""

    Config: ClassVar[type[DraftConfig]]
    on_states = True

    def __init__(self, config: Any, base: Base, heads: int = 1):
        super().__init__(config, base)
        self.output = Output(config, base, heads)

    def read_from(self, base: Base) -> None:
        self.output.read_from(base)

    def learner(self, base: Base) -> DraftLearner:
        return DraftLearner(self, base)

    def loss(
        self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"], random: Generator
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The summed loss of windows of text, over how many terms, and figures to be shown. h[:, i] is the base's state
        that has seen ids[:, : i + 1]."""
        raise NotImplementedError


RECIPE = Recipe(600, batch=8, learning_rate=2e-3, weight_decay=0.0, bf16=True)  # minutes on two cores


class DraftLearner(nn.Module):
    """A learner (`training.trainer`): a part beside its frozen base, which is no part of this module. Batches hold
    "token" and the base's "state" behind each (`states.py`)."""

    base: Base

    def __init__(self, part: DraftPart, base: Base):
        super().__init__()
        self.part = part
        self.__dict__["base"] = base
        self.figures: Mapping[str, float] = {}

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        total, count, self.figures = self._loss(batch, random)
        return total, count

    def _loss(self, batch: Mapping[str, Tensor], random: Generator) -> tuple[Tensor, Tensor, dict[str, float]]:
        h = batch["state"]
        self.base.model.to(h.device)
        return self.part.loss(self.base, h.to(next(self.part.parameters()).dtype), batch["token"], random)

    def validate(self, examples: Any) -> dict[str, float]:
        """The loss and the part's own figures on held-out windows, the same windows and noise each time."""
        sums: dict[str, float] = {}
        parts = torch.arange(len(examples)).split(8)
        for n, index in enumerate(parts):
            total, count, figures = self._loss(examples.take(index), Generator(n))
            for name, value in {"loss": float(total / count), **figures}.items():
                sums[name] = sums.get(name, 0.0) + value * len(index) / len(examples)
        return sums

    def weights_to_keep(self) -> nn.Module:
        return self.part

    def stored(self, weights: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
        """In bfloat16: a draft needs no more."""
        return WEIGHTS, {k: x.bfloat16() if x.dtype == torch.float32 else x for k, x in weights.items()}

    def finished(self) -> Any:
        """The base, which is what it was."""
        return self.base.system


# ---- files -----------------------------------------------------------------------------------------------------------


def card_of(part: Part, base: Base, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in draft.json: which part, for which base (`name`: where it is found), and how it was trained."""
    of = {
        "name": name, "fingerprint": base.fingerprint, "vocab": base.vocab, "width": base.width, "sample": base.sample,
    }  # fmt: skip
    return {"key": part.key, "config": asdict(part.config), "base": of, "training": dict(facts)}


def save_part(
    part: Part, base: Base, folder: str | Path, name: str = "", facts: Mapping[str, Any] | None = None
) -> Path:
    """A part as `load_part` reads it: draft.safetensors and draft.json, each written beside and renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safely(folder / WEIGHTS, part.state_dict(), {})
    save_json(card_of(part, base, name or base.system.meta.key, facts or {}), folder / CARD)
    return folder


def read_card(folder: str | Path) -> dict[str, Any]:
    """draft.json of a folder. Raises FileNotFoundError, ValueError where there is none, or something else."""
    path = Path(folder) / CARD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no draft part (there is no {CARD} in it): train one, or name its folder"
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        assert {"key", "config", "base"} <= card.keys() and {"name", "fingerprint"} <= card["base"].keys()
    except (ValueError, AttributeError, AssertionError):
        raise ValueError(f"{path} is not the card of a draft part; it may have been cut short") from None
    return card


def load_part(folder: str | Path, base: Base, kind: type[P]) -> P:
    """A part that `save_part` or a training wrote, in the base's number format. Raises FileNotFoundError, ValueError
    that says what is wrong: nothing there, another kind of part, one of another base, files cut short."""
    card = read_card(folder)
    if card["key"] != kind.key:
        raise ValueError(f"{folder} holds a part of {card['key']}, and {kind.key} is asked for")
    of = card["base"]
    if not base.is_of(card):
        raise ValueError(
            f"{folder} was trained for {of['name']} ({of['fingerprint']}), and this model is {base}: a part fits the "
            f"base it was trained for; {kind.made_by()} trains one for it"
        )
    try:
        part = kind(config_of(kind, card["config"]), base)
        part.chance = tuple(tuple(map(float, row)) for row in card.get("training", {}).get("chance", ()))
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{Path(folder) / CARD} is not understood: {error}") from None
    load_weights(part, Path(folder) / WEIGHTS)
    return ready(part, base)


def ready(part: P, base: Base) -> P:
    """A part as decoding uses it: frozen, in the base's number format."""
    part.to(base.device, base.dtype).eval().requires_grad_(False)
    part.read_from(base)
    return part


def config_of(kind: type[Part], settings: Mapping[str, Any]) -> Any:
    """The config of a kind of part; lists become tuples, as JSON knows only these."""
    names = {f.name for f in fields(kind.Config)}
    odd = sorted(set(settings) - names)
    if odd:
        raise TypeError(f"{kind.key} has no setting {', '.join(odd)}; it has {', '.join(sorted(names))}")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return kind.Config(**plain)
