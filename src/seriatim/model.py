"""A model: layout, order, embedding, backbone, head and condition encoders put together.

Joining parts checks that they fit: impossible combinations are refused here, with the reason and what would work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.backbones.driven import Vector
from seriatim.canvas import DELETED, GIVEN, Canvas, given_elements
from seriatim.compiling import why_not_compiled
from seriatim.conditions.condition import Condition
from seriatim.decoding.guess import Guess
from seriatim.factorization.base import Factorization
from seriatim.heads.dist import Dist
from seriatim.layout import Layout
from seriatim.plan import Plan, Reads
from seriatim.random import Key, Random

NO_CONDITION = Condition()


class Rows(NamedTuple):
    """What one forward says: a distribution for each read element, where they are, and all hidden states."""

    dist: Any
    element: Tensor | int  # (b, m) element numbers (-1: padding), or the first of a run
    hidden: Tensor
    slot: Any = None  # slots that are read: None all, a slice, or (b, m)
    said: Any = None  # the distributions before temperature and filters: how sure the model is
    spawned: Tensor | None = None  # (b, m, d): states of the slots behind a draft's nodes, which `hidden` leaves out
    guess: Guess | None = None  # the draft that was looked at, if any


class Model(nn.Module):
    """A generator over elements of `layout`, decided in the order of `factorization`.

    `embed` and `head` may be one module, or one for each kind of element. `conditions` encode raw conditions by name.
    `clock` (`conditions.clock`) makes of a condition's vector those that drive the norms of single slots.
    """

    def __init__(
        self,
        layout: Layout,
        factorization: Factorization,
        embed: nn.Module,
        backbone: nn.Module,
        head: nn.Module | Mapping[str, nn.Module],
        conditions: Mapping[str, nn.Module] | None = None,
        clock: nn.Module | None = None,
    ):
        super().__init__()
        self.layout, self.factorization = layout, factorization
        self._sound: Factorization | None = None  # the order whose packed plan has been checked
        self.embed, self.backbone, self.clock = embed, backbone, clock
        self.heads = nn.ModuleDict(head if isinstance(head, Mapping) else dict.fromkeys(layout.kinds, head))
        self.conditions = nn.ModuleDict(conditions or {})
        missing = [k for k in self._read_kinds() if k not in self.heads]
        self.__dict__.update(self._modules)  # at hand: torch's way to a part costs a call (assigning one undoes this)
        if missing:
            raise ValueError(f"no head for elements of kind {', '.join(missing)}; heads: {', '.join(self.heads)}")
        self._fits()

    def _fits(self) -> None:
        """Refuse parts of different widths, and a head whose ids the embedding does not know, where they say so."""
        width = getattr(self.backbone, "width", None)
        parts = {"embedding": self.embed, **{f"head of {kind!r}": head for kind, head in self.heads.items()}}
        for name, part in parts.items():
            own = getattr(part, "width", None)
            if None not in (width, own) and own != width:
                raise ValueError(f"the {name} is {own} wide and the backbone {width}; make them equally wide")
        for kind in self._read_kinds():
            said, heard = (getattr(part, "vocab", None) for part in (self.heads[kind], _embedding(self.embed, kind)))
            if said is not None and heard is not None and said > heard:
                raise ValueError(
                    f"the head of {kind!r} predicts {said} ids and the embedding knows {heard}; it must know them all"
                )

    def _read_kinds(self) -> list[str]:
        return list(dict.fromkeys(s.kind for s in self.layout.segments if not s.given))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def mixers(self) -> Mapping[str, str]:
        return self.backbone.mixers  # type: ignore[return-value]

    def compile_decoding(self) -> None:
        """Compile the step of one element a row, at the first such step (some seconds, once). Worth it where hundreds
        of tokens are generated. Raises ValueError where nothing can be compiled, with the reason."""
        if missing := why_not_compiled(self.device):
            raise ValueError(f"decoding cannot be compiled: {missing}")
        for part in (self.backbone, *self.heads.values()):
            if hasattr(part, "compile_decoding"):
                part.compile_decoding()  # type: ignore[operator]

    def new_cache(self, batch: int, capacity: int = 256):
        """An empty cache; `capacity`: slots a row to make room for at first."""
        return self.backbone.new_cache(batch, capacity)  # type: ignore[operator]

    # ---- canvases and conditions ------------------------------------------------------------------------------------

    def canvas(
        self,
        value: Mapping[str, Tensor],
        known: int | Tensor = 0,
        random: Random | None = None,
        row: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Canvas:
        """A canvas in this model's order. `known`: how many first elements are given, in all rows or (batch,) in each,
        or which (boolean)."""
        layout = layout or self.layout
        value = {kind: self._checked(kind, x) for kind, x in value.items()}
        if not isinstance(known, int):
            known = given_elements(layout, known, next(iter(value.values())).shape[0])
        rank = self.factorization.order(layout, random)
        plain = rank.shape[0] == 1 and bool((rank[0] == torch.arange(layout.size)).all())
        return Canvas(layout, value, known, None if plain else _dense(rank, known, layout), row)

    def _head(self, kind: str) -> nn.Module | None:
        return self.heads[kind] if kind in self.heads else None  # noqa: SIM401 (a ModuleDict has no get)

    def _checked(self, kind: str, value: Tensor) -> Tensor:
        """Ids of a kind as int64, inside its vocabulary; vectors as they are."""
        head = self._head(kind)
        if not isinstance(value, Tensor):
            raise TypeError(f"values of {kind!r} are a tensor, got {type(value).__name__}")
        if getattr(head, "continuous", False) or (head is None and value.is_floating_point()):
            return value
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"values of {kind!r} are ids, integers, got {value.dtype}")
        vocab = getattr(head, "vocab", None)
        if value.numel() and vocab is not None and not 0 <= int(value.min()) <= int(value.max()) < vocab:
            raise ValueError(
                f"ids of {kind!r} lie in 0..{vocab - 1}, got {int(value.min())}..{int(value.max())}: the tokenizer and "
                "the model belong to different vocabularies, or unknown elements hold something else than 0"
            )
        return value.long()

    def blank(self, batch: int, random: Random | None = None, layout: Layout | None = None) -> Canvas:
        """A canvas with nothing known."""
        layout = layout or self.layout
        value = {}
        for kind in layout.kinds:
            head = self._head(kind)
            shape = getattr(head, "value_shape", ())
            dtype = torch.float32 if getattr(head, "continuous", False) else torch.long
            value[kind] = torch.zeros(batch, layout.count(kind), *shape, dtype=dtype)
        return self.canvas(value, 0, random, layout=layout)

    def encode(
        self,
        raw: Mapping[str, Tensor] | None,
        drop: Bool[Tensor, "b"] | Mapping[str, Bool[Tensor, "b"]] | None = None,
    ) -> Condition:
        """Encode raw conditions; rows in `drop` get the null, of all conditions or of those that it names."""
        raw = raw or {}
        if set(raw) != set(self.conditions):
            wants = ", ".join(self.conditions) or "none"
            raise ValueError(f"this model takes the conditions: {wants}; got: {', '.join(raw) or 'none'}")
        out = Condition()
        for name, encoder in self.conditions.items():
            gone = drop.get(name) if isinstance(drop, Mapping) else drop
            if gone is not None and not encoder.has_null:
                raise ValueError(
                    f"condition {name!r} has no null, so it cannot be dropped or guided; "
                    "train with a null (has_null) or decode without guidance"
                )
            out = out.merge(encoder(raw[name], gone))
        return out

    # ---- forward ----------------------------------------------------------------------------------------------------

    def vectors(
        self, plan: Plan, canvas: Canvas, condition: Condition | None = None, guess: Guess | None = None
    ) -> Float[Tensor, "b s d"]:
        """What stands in the slots of a plan, conditions of single elements included."""
        c = condition or NO_CONDITION
        if c.rows is not None and c.rows != canvas.batch:
            raise ValueError(f"conditions of {c.rows} samples were given for a canvas of {canvas.batch}")
        x = self.embed(canvas, plan, guess, c.prefix)
        if c.per_element is not None:
            x = x + _at_readers(c.per_element, plan, canvas, x)
        return x

    def hidden(
        self,
        plan: Plan,
        canvas: Canvas,
        cache=None,
        condition: Condition | None = None,
        guess: Guess | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Embed the slots of a plan and contextualise them."""
        c = condition or NO_CONDITION
        embed, backbone = _direct(self.embed), _direct(self.backbone)
        x = embed(canvas, plan, guess) if c.rows is None else self.vectors(plan, canvas, c, guess)
        return backbone(x, plan, cache, self.driving(plan, canvas, c.vector), c.memory, *c.padding)

    def driving(self, plan: Plan, canvas: Canvas, vector: Tensor | None) -> Vector | None:
        """What drives adaptive norms: a condition's vector, or what the clock makes of it."""
        return vector if self.clock is None else self.clock(canvas, plan, vector)

    def dist(self, h: Float[Tensor, "b s d"], plan: Plan, canvas: Canvas) -> tuple[Dist, Tensor | int, Any]:
        """The distribution of everything the plan reads, the elements, and the slots read."""
        if plan.run is not None:
            where = plan.shape.read  # type: ignore[attr-defined]
            h = h if where is None else h[:, where]
            head = self.heads._modules[canvas.layout.kinds[0]]
            return head.dist(h, None, canvas), canvas.length or 0, where  # type: ignore[operator]
        # nodes of a draft tree read an element each behind a text of its own: nothing to merge
        reads = merge_readers(plan.reads) if plan.slots.node is None else plan.reads
        kind = read_kind(canvas, reads)
        head = self.heads[kind]
        h = pick_slots(h, plan.reads.slot)
        dist = head.dist(h, plan.reads, canvas)  # type: ignore[operator]
        if reads is not plan.reads:
            dist = average(dist, plan.reads, reads)
        return dist, reads.element, plan.reads.slot

    def log_prob(self, canvas: Canvas, condition: Mapping[str, Tensor] | None = None) -> Float[Tensor, "b"]:
        """Log-probability of each finished row given its given elements, in one pass; nats.

        Raises where the order has no exact likelihood (use the bound of its objective)."""
        f = self.factorization
        if f.likelihood != "exact":
            raise TypeError(f"{type(f).__name__} has no exact likelihood ({f.likelihood}); ask for a bound")
        return -self.losses(canvas, condition, strict=True).sum(1)

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The loss of each element under teacher forcing (given elements: 0), by one packed forward.

        Heads whose loss is an expectation over noise (diffusion, flow) draw it from `random`."""
        plan = self.factorization.packed(canvas)
        if plan is None:
            raise TypeError(f"{type(self.factorization).__name__} has no packed form; train it by its own objective")
        if self._sound is not self.factorization:  # an order that peeks is refused before it is trained
            plan.check(self.mixers, self.factorization.due(canvas))
            self._sound = self.factorization
        encoded = condition if isinstance(condition, Condition) else self.encode(condition, drop)
        return self.losses_by(plan, canvas, encoded, strict, random)

    def losses_by(
        self,
        plan: Plan,
        canvas: Canvas,
        condition: Condition | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The same by a plan that is at hand: the loss of each element that it reads."""
        return self.losses_at(self.hidden(plan, canvas, None, condition), plan.reads, canvas, strict, random)

    def losses_at(
        self,
        h: Float[Tensor, "b s d"],
        reads: Reads,
        canvas: Canvas,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The same where the slots have been computed: one forward may be read in several orders, each by itself."""
        precision = torch.float64 if h.dtype == torch.float64 else torch.float32
        out = h.new_zeros(canvas.batch, canvas.layout.size, dtype=precision)
        for kind, part in by_kind(canvas, reads):
            head = self.heads[kind]
            if strict and not getattr(head, "exact", False):
                raise TypeError(f"{type(head).__name__} has no log_prob, so this model has no likelihood")
            merged = merge_readers(part)
            live, element = counted(canvas, merged.element)
            index = canvas.layout.index[element].to(h.device)
            target = canvas.value[kind]
            target = target[torch.arange(canvas.batch, device=target.device)[:, None], index]
            picked = pick_slots(h, part.slot)
            if merged is not part:
                loss = -average(head.dist(picked, part, canvas), part, merged).log_prob(target)  # type: ignore[operator]
            elif getattr(head, "in_place", False):
                loss = head.dist(picked, part, canvas).loss(target)  # type: ignore[operator]
            else:
                noise = () if random is None else (random, Key(canvas.row, part.element))
                loss = head.loss(picked, part, target, *noise)  # type: ignore[operator]
            out = out.scatter_add(1, element.to(h.device), (loss * live.to(h.device)).to(out.dtype))
        return out


def _direct(module: nn.Module) -> Any:
    """Its `forward`, where nothing hangs on the call: torch's way there costs as much as a small step's bookkeeping."""
    m = module
    hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return m if hooked or m._compiled_call_impl is not None else m.forward


def _embedding(embed: Any, kind: str) -> Any:
    """The part that embeds the values of a kind, if it says so."""
    parts = dict(embed.embeds.items()) if hasattr(embed, "embeds") else {getattr(embed, "kind", None): embed}
    return parts.get(kind)


def by_kind(canvas: Canvas, reads: Reads) -> list[tuple[str, Reads]]:
    """The read-outs of each kind of element apart."""
    layout = canvas.layout
    if len(layout.kinds) == 1:
        return [(layout.kinds[0], reads)]
    kind = layout.kind[reads.element.clamp(min=0)]
    parts = []
    for number, name in enumerate(layout.kinds):
        mine = (kind == number) & (reads.element >= 0)
        columns = mine.any(0).nonzero()[:, 0]
        if columns.numel():
            role = None if reads.role is None else reads.role[:, columns]
            element = torch.where(mine, reads.element, -1)[:, columns]  # rows may read another kind in this column
            parts.append((name, Reads(reads.slot[:, columns], element, role)))
    return parts


def read_kind(canvas: Canvas, reads: Reads) -> str:
    """The one kind of element that a decoding step reads."""
    kinds = canvas.layout.kinds
    if len(kinds) == 1:
        return kinds[0]
    found = canvas.layout.kind[reads.element[reads.element >= 0]].unique()
    if found.numel() != 1:
        names = ", ".join(kinds[int(k)] for k in found)
        raise ValueError(f"one decoding step reads elements of several kinds ({names}); give them different ranks")
    return kinds[int(found[0])]


def pick_slots(h: Float[Tensor, "b s d"], slot: Tensor) -> Float[Tensor, "b m d"]:
    """Hidden states at the slots that are read."""
    if slot.shape[0] == 1:
        return h[:, slot[0].clamp(min=0).to(h.device)]
    return h.gather(1, slot.clamp(min=0).to(h.device)[..., None].expand(-1, -1, h.shape[-1]))


def counted(canvas: Canvas, element: Int[Tensor, "b m"]) -> tuple[Bool[Tensor, "b m"], Int[Tensor, "b m"]]:
    """Which read-outs of these elements count: neither padding (-1) nor given nor cut off; and their numbers, 0 for
    padding."""
    number = element.clamp(min=0).expand(canvas.batch, -1)
    status = canvas.status.gather(1, number)
    return (element >= 0) & (status != GIVEN) & (status != DELETED), number


def merge_readers(reads: Reads) -> Reads:
    """One read-out an element in every row, by number (-1 first, as padding); the same object where no element of any
    row has several readers."""
    cached = reads.__dict__.get("_merged")
    if cached is not None:
        return cached
    merged = reads
    ordered = reads.element.sort(1).values
    again = ordered[:, 1:] == ordered[:, :-1]
    if bool((again & (ordered[:, 1:] >= 0)).any()):
        unique = torch.cat([ordered[:, :1], torch.where(again, -1, ordered[:, 1:])], 1).sort(1).values
        element = unique[:, int(again.sum(1).min()) :].contiguous()
        merged = Reads(torch.full_like(element, -1), element)
    reads.__dict__["_merged"] = merged
    return merged


def average(dist, reads: Reads, merged: Reads):
    """Average the logits of all readers of an element: the normalised product of their experts."""
    if not hasattr(dist, "logits"):
        raise TypeError(f"an element is read at several slots, which {type(dist).__name__} cannot merge")
    logits = dist.logits
    index = torch.searchsorted(merged.element, reads.element).to(logits.device)
    batch, columns = logits.shape[0], merged.element.shape[1]
    where = index.expand(batch, -1)[..., None].expand_as(logits)
    total = logits.new_zeros(batch, columns, logits.shape[-1]).scatter_add(1, where, logits)
    count = torch.zeros_like(merged.element, device=index.device).scatter_add(1, index, torch.ones_like(index))
    return type(dist)(total / count.clamp(min=1)[..., None])


def _at_readers(per_element: Float[Tensor, "b E d"], plan: Plan, canvas: Canvas, x: Tensor) -> Tensor:
    """Condition of each element that is not given, added at the slots that read it."""
    batch, count, width = per_element.shape
    if count != canvas.layout.size:
        raise ValueError(f"a condition per element has {count} elements, the canvas has {canvas.layout.size}")
    reads = plan.reads if plan.readers is None else plan.readers
    # a draft may reach beyond the end, where whatever stands is read by nobody
    slot, where = reads.slot, reads.element.clamp(min=0, max=count - 1).expand(batch, -1)
    live = ((slot >= 0) & (reads.element >= 0) & (canvas.rank.gather(1, where) >= 0)).to(x.device)
    slot, where = slot.to(x.device), where.to(x.device)
    value = per_element.gather(1, where[..., None].expand(-1, -1, width)) * live[..., None]
    index = slot.clamp(min=0).expand(batch, -1)[..., None].expand_as(value)
    return torch.zeros_like(x).scatter_add(1, index, value.to(x.dtype))


def _dense(rank: Tensor, known: int | Tensor, layout: Layout) -> Tensor:
    """Ranks of the elements that are not given, without holes: 0, 1, 2, ... whatever was given."""
    given = torch.arange(layout.size)[None] < known if isinstance(known, int) else known
    given = (given | layout.given).expand(max(rank.shape[0], given.shape[0]), -1)
    rank = rank.expand(given.shape[0], -1).masked_fill(given, -1)
    rows = []
    for row in rank:
        unique = row.unique()
        shift = 0 if int(unique[0]) < 0 else 1
        rows.append(torch.searchsorted(unique, row) + shift - 1)
    return torch.stack(rows)
