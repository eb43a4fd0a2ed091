"""Text by edits in continuous time: insertions, deletions, substitutions, many at once (Edit Flows, Havasi et al. 2025,
arXiv 2506.09018).

New in it: a discrete flow over texts of any length, whose jumps are edits at places relative to the text, so there are
neither masks nor places kept free. The model gives the rate of every edit of the present text; it is trained on texts
half of whose edits are done, by an alignment with blanks that only training knows.

Texts begin empty, and all edits are insertions; or with `start` random tokens, which are matched at random with those
of the text. Then tokens are put in place of others and deleted too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Insert, Revise
from seriatim.decoding.edits import Editing, level_of
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider
from seriatim.embed import TokenEmbed
from seriatim.factorization.insertion import Insertion
from seriatim.heads.denoiser import FREQUENCIES, time_features
from seriatim.heads.dist import Categorical
from seriatim.heads.edits import EditHead
from seriatim.laws.case import Limit, randomise
from seriatim.laws.inserted import InsertedCase
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.edited import INSERTION, Edited
from seriatim.objectives.inserted import Dropped, with_gap
from seriatim.plan import Plan
from seriatim.systems.claim import Claim
from seriatim.systems.decoders import Decoding
from seriatim.systems.inserted_text import InsertedText
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.text.ilm import arm_of
from seriatim.training.recipe import Recipe

META = Meta(
    key="edit-flows",
    title="Edit Flows: text by edits in continuous time",
    family="text",
    modality="text",
    paper="Edit Flows: Flow Matching with Edit Operations (2025), arXiv 2506.09018",
    likelihood="bound",
    summary="Insertions, deletions and substitutions, many at once, at rates that a model gives.",
)

CLAIM = Claim(
    text="On star graphs with arms of different lengths, Edit Flows write at least one and a half times as many exact "
    "paths as next-token prediction of the same shape, after as many steps (ilm beside them).",
    paper="better than next-token and masked models in captioning, better than masked models in text and code",
    metric="exact_paths",
    better="higher",
    margin=1.5,
    arms={
        "edit-flows": arm_of("edit-flows", turns=32),
        "next-token": arm_of("next-token"),
        "ilm": arm_of("ilm"),
    },
    ours="edit-flows",
    baseline="next-token",
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stars",
)


TURNS = 128  # steps of decoding, where nothing is said


@dataclass(frozen=True)
class Config:
    """Sizes; `length` is the longest text in tokens, `hidden` the width of the feed-forward layers (None: 8/3 of the
    width, in steps of 8). `start`: how many random tokens a text begins with (0: none; then tokens are only inserted).
    `short`: share of the windows that are cut to a random length. `power`: of time, the share of edits that are done by
    then in decoding."""

    length: int = 256
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    start: int = 0
    short: float = 1.0
    power: float = 3.0

    def __post_init__(self) -> None:
        Editing(1, self.length, self.power)  # refuses what is impossible
        if not 0 <= self.short <= 1 or not 0 <= self.start <= self.length:
            raise ValueError(
                f"short is a share of the windows from 0 to 1, and a text begins with 0 to {self.length} tokens; got "
                f"{self.short}, {self.start}"
            )


class TimedEmbed(TokenEmbed):
    """Tokens, and at the start the time: the share of edits that is left (a row's noise level). (Added everywhere it
    would drown the tokens.)"""

    def __init__(self, vocab: int, width: int):
        super().__init__(vocab, width)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        x = super().forward(canvas, plan, guess, prefix)
        time = self.time(time_features(1000 * level_of(canvas).to(x)))[:, None]
        return torch.cat([x[:, :1] + time.to(x), x[:, 1:]], 1)


def build(config: Config | None = None) -> Edited:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed, head = TimedEmbed(c.vocab, c.width), EditHead(c.width, c.vocab, edits=c.start > 0)
    return Edited(line(c.length), Insertion(), embed, backbone, head, start=c.start)


class EditFlows(InsertedText):
    """Edits of all slots at once, from the text as it is and the time."""

    meta, Config = META, Config
    sizes = MappingProxyType({"tiny": {}, "small": {"length": 512, "depth": 8, "hidden": 640}})
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=8, learning_rate=1e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(6000, batch=16, learning_rate=1e-3, weight_decay=0.1, bf16=True, compile=True),
    })  # fmt: skip
    sampling = Sampling(temperature=0.7, top_p=0.95, steps=TURNS)

    model: Edited

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def _decoded(self, canvas: Canvas, way: Decoding, sampling: Sampling, seed: int, *rest: Any) -> Iterator[bool]:
        """From random tokens in the first gap, if texts begin so."""
        room = getattr(way.decider, "limit", self.model.layout.size) - int(canvas.known.sum())
        count = max(min(self.config.start, room), 0)
        if count:
            first = torch.randint(self.model.vocab, (1, count), generator=torch.Generator().manual_seed(seed))
            canvas.apply([Insert(canvas.open.long().argmax(1, keepdim=True).expand(1, count), first)])
        yield from super()._decoded(canvas, way, sampling, seed, *rest)

    def inserter(self, sampling: Sampling, limit: int) -> Decider:
        return Editing(sampling.steps or TURNS, limit, self.config.power)


# ---- what the laws run -----------------------------------------------------------------------------------------------

WHY = {1: "edited in any order", 2: "a text is reached by many edits"}
FEW, LIMIT = 2, 1  # steps and tokens of the case


class EditsOf(InsertedCase):
    """Every outcome of the edits of a step, from texts that are given at once and not edited one by one."""

    def law(self) -> Mapping[tuple[int, ...], float]:
        now = {self.start: 1.0}
        for turn in range(FEW):
            done, later = (turn / FEW) ** 3, ((turn + 1) / FEW) ** 3
            reached: dict[tuple[int, ...], float] = {}
            for text, p in now.items():
                for outcome, q in self._edited(text, done, (later - done) / (1 - done)):
                    reached[outcome] = reached.get(outcome, 0.0) + p * q
            now = reached
        size = self.model.layout.size
        return {(*text, *[-1] * (size - len(text))): p for text, p in now.items()}

    def _edited(self, text: tuple[int, ...], done: float, share: float) -> list[tuple[tuple[int, ...], float]]:
        """What becomes of a text in a step, with probabilities: `None` stands for nothing."""
        rates, v = self.rates(text, done), self.vocab
        inserts = [_choices(dict(enumerate(row[:v])), share) for row in rates]
        changes = [_choices({**dict(enumerate(row[v:-1])), -1: row[-1]}, share) for row in rates[1:]]
        out = []
        for change in itertools.product(*(c.items() for c in changes)):
            kept = [x if new is None else new for x, (new, _) in zip(text, change, strict=True)]
            left = LIMIT - sum(x >= 0 for x in kept)
            for insert in itertools.product(*(c.items() for c in inserts)):
                room, made = left, list[int]()
                for x, (new, _) in zip([-1, *kept], insert, strict=True):
                    made += [x] if x >= 0 else []
                    if new is not None and room > 0:
                        made, room = [*made, new], room - 1
                p = 1.0
                for _, q in (*change, *insert):
                    p *= q
                out.append((tuple(made), p))
        return out

    def rates(self, text: tuple[int, ...], done: float) -> list[list[float]]:
        """Rates of all edits at each slot of a text, when a share of the edits is done."""
        canvas = self.holding(torch.tensor([text], dtype=torch.long))
        canvas.apply([Revise(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), torch.tensor([[1 - done]]))])
        plan = self.model.factorization.step(canvas, None, 0)
        assert plan is not None
        with torch.no_grad():
            dist, _, _ = self.model.dist(self.model.hidden(plan, canvas), plan, canvas)
        return dist.logits[0].exp().tolist()  # type: ignore[attr-defined]

    def tokens(self, dist: Any) -> Tensor:
        return dist.logits[..., : self.vocab].logsumexp(1)

    def learn(self, steps: int = 250, batch: int = 32) -> tuple[float, float]:
        return super().learn(steps, batch)  # what a text began with is no evidence, and takes longer to tell apart


def _choices(rates: dict[int, float], share: float) -> dict[int | None, float]:
    """Probabilities of edits that exclude each other, and of none."""
    total = sum(rates.values())
    happens = min(total * share, 1.0)
    some: dict[int | None, float] = {k: r / total * happens for k, r in rates.items() if r > 0}
    return {**some, None: 1 - happens}


def case() -> EditsOf:
    """A tiny instance for the laws: texts of at most one token, which begin with one."""
    return _case(lambda: Editing(FEW, LIMIT))


def _case(decider: Any) -> EditsOf:
    model = randomise(build(Config(length=3, vocab=2, width=16, depth=2, heads=2, start=1)), std=0.4)
    return EditsOf(model, vocab=2, decider=decider, limits=(insertions_are_those_of_ilm,), exempt=WHY, start=(0,))


class Jumps(EditHead):
    """Which insertion comes next in continuous time: rates over their sum."""

    def dist(self, h: Tensor, reads: Any, canvas: Canvas) -> Any:
        rates = super().dist(h, reads, canvas).logits.flatten(1)
        return Categorical(torch.nn.functional.pad(rates.log_softmax(1), (0, 1), value=-torch.inf)[:, None])


def insertions_are_those_of_ilm() -> Limit:
    """Of insertions only, at rates that do not depend on time: the loss, over all times and sets that are missing, is
    the sum over their number n of ILM's loss for the choices u / sum(u), and of how far sum(u) is from n."""
    edited = build(Config(length=3, vocab=3, width=16, depth=2, heads=2))
    randomise(edited, std=0.4)
    nn.init.zeros_(edited.get_parameter("embed.time.2.weight"))
    jumps = Jumps(16, 3, edits=False).double()
    jumps.load_state_dict(edited.heads["token"].state_dict())
    ilm = Dropped(edited.layout, edited.factorization, edited.embed, edited.backbone, jumps)
    x = torch.tensor([[0, 1, 2], [2, 0, 1]])
    canvas, kinds = ilm.canvas({"token": x}), torch.full((2, 3), INSERTION)
    got, want = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    share = torch.tensor([0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5], dtype=torch.float64)  # Gauss and Legendre, exact here
    for there in itertools.product((False, True), repeat=3):
        known, n = torch.tensor(there).expand(2, -1), 3 - sum(there)
        if not n:
            continue
        shown, _ = with_gap(canvas, ~known)
        plan = ilm.factorization.step(shown, None, 0)
        assert plan is not None
        with torch.no_grad():
            for k, weight in zip(share, (5 / 18, 8 / 18, 5 / 18), strict=True):
                loss = edited.edited_losses(canvas, x[:, :0], kinds, known, (1 - k).expand(2))
                got += weight * k ** (3 - n) * (1 - k) ** (n - 1) * loss
            rates = edited.dist(edited.hidden(plan, shown), plan, shown)[0].logits  # type: ignore[attr-defined]
            total = rates.logsumexp((1, 2))
            of_this_number = {1: 3, 2: 3, 3: 1}[n]
            want += (ilm.dropped_losses(canvas, ~known) + total.exp() / n - total - 1) / of_this_number
    return Limit("insertions = ILM's, by how many are missing", got, want)


class Hasty(Editing):
    """Wrong on purpose: forgets that fewer and fewer edits are left to happen."""

    def _time(self, canvas: Canvas) -> Any:
        turn, share = super()._time(canvas)
        return turn, share * level_of(canvas).double()


def mutant() -> EditsOf:
    """The case with wrong probabilities of edits, which the laws must catch."""
    return _case(lambda: Hasty(FEW, LIMIT))
