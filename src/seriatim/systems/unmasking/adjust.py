"""ADJUST: several tokens a forward, each refreshed by a small layer for those before it.

New: tokens that a masked model decides by one forward do not know of each other. One more layer, unrolled behind the
frozen model, estimates after each token what the model's states would now be; so tokens are drawn one after another,
nearly from the model's joint law, by one forward of it and a layer for each further token (Bansal & Sanghavi 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from math import log, prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from seriatim.canvas import Canvas, Set
from seriatim.decoding.adjust import Adjusted, Sampler
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import Rule, Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.evaluation.pictures import write_beside
from seriatim.home import HOME
from seriatim.laws.case import Limit
from seriatim.laws.drafts import untrained
from seriatim.laws.unmasking import NEW as LENGTH
from seriatim.laws.unmasking import SAMPLINGS, UnmaskingCase, plain
from seriatim.model import Rows
from seriatim.plan import Plan
from seriatim.posttraining.adjust import Adjust, AdjustConfig
from seriatim.posttraining.drafting import Base, ready
from seriatim.random import Generator, Keyed
from seriatim.systems.claim import Arm, Claim, Trial
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_parts import draft_part
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.text.mdlm import MDLM
from seriatim.systems.text.mdlm import Config as MDLMConfig
from seriatim.systems.trials import Continued, continued, held_out, quality
from seriatim.training.checkpoint import load_weights
from seriatim.training.loop import adamw, fit
from seriatim.training.recipe import Recipe
from seriatim.training.state import write_safely
from seriatim.training.trainer import number_of

META = Meta(
    key="adjust",
    title="ADJUST: approximate joint sampling",
    family="unmasking",
    modality="text",
    paper="Enabling Approximate Joint Sampling in Diffusion LMs (2025), arXiv 2509.22738",
    likelihood="relaxed",
    summary="A layer refreshes the model's states after each of several tokens of a forward.",
)
EXAMPLE = "adjust:runs/adjust"
Part, Config = Adjust, AdjustConfig
RECIPE = Recipe(300, batch=16, learning_rate=3e-3, weight_decay=0.0, bf16=True)  # some minutes on two cores


@dataclass(frozen=True)
class Options:
    """tokens: that are decided a forward (steps that are asked for are not heeded); rule: which first (None: as the
    layer was trained); see unmask. Neutral: 1 token."""

    tokens: int = 4
    rule: Rule | None = None


def decoder(ask: Ask) -> Decoding:
    """The trained layer is the source: `adjust:FOLDER`."""
    part, _ = draft_part(ask, Adjust)
    return adjusted(ask, part, part.config.rule)


def adjusted(ask: Ask, sampler: Sampler, rule: Rule, decider: type[Adjusted] = Adjusted) -> Decoding:
    """With this layer."""
    o = ask.options
    way = decider(Unmask(Select(o.rule or rule, ask.system.model.layout.size), ask.stop), sampler, o.tokens)
    return Decoding(way, way)


# ---- what there is to see --------------------------------------------------------------------------------------------


PROMPT = '''def read(path):
    """Read a text file and return its lines."""
'''
COLOURS = ("#ffffff", "#c7e9c0", "#74c476", "#238b45")


def shown(ask: Ask, folder: Path, length: int = 96, tokens: int = 4) -> dict[str, float]:
    """Two texts of as many tokens a forward, drawn independently and adjusted, as a page: the darker a token, the later
    it was decided of those of its forward; one that repeats its neighbour is framed. The share of these."""
    system = ask.system
    prompt, found, page = system.tokenizer.encode(PROMPT), {}, ["<meta charset=utf-8>"]
    ways = {"independent": "unmask+rule=entropy", "adjusted": f"adjust:{folder}+tokens={tokens}"}
    for name, spec in ways.items():
        made = continued(system, [prompt], length, spec, Sampling(steps=max(length // tokens, 1)))
        ids = made.ids[0]
        again = [i > 0 and ids[i] == ids[i - 1] for i in range(length)]
        text = "".join(_span(system, *one) for one in zip(ids, _turns(made, len(prompt)), again, strict=True))
        page.append(f"<h3>{name}</h3><pre>{escape(PROMPT)}{text}</pre>")
        found[f"repeated_{name}"] = sum(again) / length
    write_beside(folder / "texts.html", lambda file: file.write("\n".join(page).encode()))
    return found


def _turns(made: Continued, given: int) -> list[int]:
    """Behind how many others of its forward each token of the first row was decided."""
    turns = [0] * len(made.ids[0])
    for step in made.steps:
        for turn, edit in enumerate(step.edits):
            if isinstance(edit, Set) and edit.element is not None:
                for element in edit.element[0][edit.element[0] >= 0].tolist():
                    turns[element - given] = turn
    return turns


def _span(system: Any, token: int, turn: int, again: bool) -> str:
    frame = ";outline:1px solid red" if again else ""
    colour = COLOURS[min(turn, len(COLOURS) - 1)]
    return f'<span style="background:{colour}{frame}">{escape(system.tokenizer.decode([token]))}</span>'


# ---- what it claims: shuffled names ---------------------------------------------------------------------------------


ITEMS, BATCH = 6, 64
STEPS, UNROLLED, DRAWN = 1500, 1500, 2000  # of the model, of the layer, and texts that are looked at
AT_ONCE = (1, 2, 3, 6)
VARIED = 0.9  # share of the entropy of as many true texts; less, and a sampler writes the same again and again


def independently(tokens: int, items: int = ITEMS) -> float:
    """How probable it is that things in random order are each there once, if so many places at a time are filled by the
    true laws of each, independent of each other (ParallelBench's closed form)."""
    left = range(items, 0, -tokens)
    return prod((m - i) / m for m in left for i in range(min(tokens, m)))


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """So many orders of six things, (count, 6)."""
    return torch.rand(count, ITEMS, generator=generator).argsort(1)


def bits(ids: Tensor) -> float:
    """The entropy of whole texts, as often as each is there; more texts have more."""
    share = ids.unique(dim=0, return_counts=True)[1].double() / max(len(ids), 1)
    return float(-(share * share.log2()).sum())


def shuffling() -> MDLM:
    """A small masked model that has learned to write six things in any order, each once. Trained once, and kept under
    SERIATIM_HOME."""
    shape = {"length": ITEMS, "vocab": ITEMS, "width": 64, "depth": 3, "heads": 4}
    torch.manual_seed(0)
    system = MDLM(MDLMConfig(**shape, block=None), SimpleNamespace(special={}, vocab=ITEMS))  # type: ignore[arg-type]
    file = HOME / "claims" / META.key / f"shuffling-{STEPS}.safetensors"
    if not file.is_file():
        recipe = Recipe(STEPS, BATCH, 3e-3, weight_decay=0.0)
        fit(system.model, lambda n, g: (system.model.canvas({"token": shuffled(n, g)}), None), recipe)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_safely(file, system.model.state_dict(), {})
    load_weights(system.model, file)
    return system.eval()


def taught(system: MDLM, seed: int) -> Adjust:
    """A layer beside it."""
    torch.manual_seed(seed)
    base, generator = Base(system), torch.Generator().manual_seed(seed)
    part = Adjust(AdjustConfig(unroll=ITEMS - 1), base)
    recipe, learner = Recipe(UNROLLED, BATCH, 3e-3, weight_decay=0.0), part.learner(base)
    optimizer = adamw(part, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    for step in range(UNROLLED):
        batch = {"token": shuffled(BATCH, generator)}
        total, count = learner(batch, Generator(number_of(seed, step)), step, UNROLLED)
        optimizer.zero_grad(set_to_none=True)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(part.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
    return ready(part, base)


def shuffling_trial(adjusted: bool) -> Callable[[Any, int], Mapping[str, float]]:
    """Of texts written at temperature 1, the share that has each thing once, by numbers of tokens a forward; `right`:
    by three, if these are nearly as varied as as many true ones, else 0."""

    def measure(_: Any, seed: int) -> Mapping[str, float]:
        system = shuffling()
        sampler: Sampler = taught(system, seed) if adjusted else lambda e, h, plan: h
        found: dict[str, float] = {}
        for k in AT_ONCE:
            canvas = system.blocked(system.model.blank(DRAWN), ITEMS)
            way = Adjusted(Unmask(Select("entropy", ITEMS)), sampler, k)
            ids = generate(Target(system.model), canvas, way, way, Keyed(seed)).value["token"]
            right = ids[(ids.sort(1).values == torch.arange(ITEMS)).all(1)]
            true = bits(shuffled(len(right), torch.Generator().manual_seed(seed)))
            found |= {f"right_{k}": len(right) / DRAWN, f"bits_{k}": bits(right), f"true_bits_{k}": true}
            found[f"independent_{k}"] = independently(k)
        return {"right": found["right_3"] if found["bits_3"] >= VARIED * found["true_bits_3"] else 0.0, **found}

    return measure


# ---- and texts -------------------------------------------------------------------------------------------------------


PROMPTS, GIVEN, NEW = 32, 64, 64


def written(system: Any, spec: str, seed: int, tokens: int | None = None) -> dict[str, float]:
    """Texts at temperature 1 behind held-out ones, by a decoder, and how well they hold together: nats a token that
    text-base finds in them, less than by their tokens' frequencies alone (`context`, their entropy less these nats). A
    sampler that writes the same again and again gains nothing by it. tokens: of a forward, where steps say it."""
    given = held_out(system, PROMPTS, GIVEN)
    made = continued(system, given, NEW, spec, Sampling(steps=NEW // tokens if tokens else None), seed)
    nats, bits = quality(given, made.ids)
    same = [a == b for row in made.ids for a, b in pairwise(row)]
    return {
        "context": bits * log(2) - nats, "nats_per_token": nats, "entropy": bits, "repeated": sum(same) / len(same),
        "tokens_per_forward": NEW / len(made.steps), "seconds": made.seconds,
    }  # fmt: skip


def trial(tokens: int) -> Callable[[Any, int], Mapping[str, float]]:
    """So many tokens a forward, independent of each other."""
    return lambda system, seed: written(system, "unmask+rule=entropy", seed, tokens)


def _judged(trained: Any) -> dict[str, Any]:
    """By 4 tokens a forward, as it was trained; by other numbers, too."""
    found = {n: written(trained.system, f"adjust:{trained.folder}+tokens={n}", 0) for n in (2, 4, 8)}
    others = {f"{name}_at_{n}": found[n][name] for n in (2, 8) for name in ("context", "nats_per_token", "entropy")}
    held = {k: v for k, v in trained.history[-1].items() if k in ("held_out_kl", "held_out_marginal")}
    return {**found[4], **others, **held}


CLAIM = Claim(
    text="Of six things in random order, of which each forward decides three, at least three times as many texts have "
    "each thing once where a layer refreshes the states after each of them as where they are drawn independently "
    "(0.12 of all texts, by the closed form), and the texts are as varied as they should be.",
    paper="MAUVE 0.87 against 0.31 at 4 tokens a forward (Dream-7B, one token a forward being the reference)",
    metric="right",
    arms={
        "adjusted": Trial("zoo:text-mdlm", shuffling_trial(True)),
        "independent": Trial("zoo:text-mdlm", shuffling_trial(False)),
        "text, adjusted": Arm("adjust", steps=300, base="zoo:text-mdlm", measure=_judged),
        "text, independent": Trial("zoo:text-mdlm", trial(4)),
        "text, one a forward": Trial("zoo:text-mdlm", trial(1)),
    },
    ours="adjusted",
    baseline="independent",
    better="higher",
    margin=3.0,
    other_seeds=(0,),
    data="stdlib",
)


# ---- laws ------------------------------------------------------------------------------------------------------------


def _itself(ask: Ask, decider: type[Adjusted] = Adjusted) -> Decoding:
    """In the place of the layer the whole model, which knows its states."""
    return adjusted(ask, lambda e, h, p: ask.system.model.backbone(e, p), "entropy", decider)


def _untrained(ask: Ask, decider: type[Adjusted] = Adjusted, gain: bool = True) -> Decoding:
    """With a layer of arbitrary weights; without a gain it changes nothing."""
    part, _ = untrained(Adjust, AdjustConfig(), ask.system)
    part.gain.mul_(float(gain))
    return adjusted(ask, part, "entropy", decider)


def _case(decider: type[Adjusted] = Adjusted) -> UnmaskingCase:
    """With limits of the very decider."""

    def exact() -> Limit:
        """However many tokens a forward."""
        case = UnmaskingCase(lambda ask: _itself(ask, decider), Options(5, "confidence"), blocks=False)
        system, ours, theirs = case.systems[0], [], []
        for seed, sampling in enumerate(SAMPLINGS):
            ours.append(case.text(system, sampling, case.decoding(system, sampling), seed=seed))
            theirs.append(case.text(system, sampling, plain(system, None), seed=seed))
        return Limit("with the model as its own sampler, one token a forward", torch.tensor(ours), torch.tensor(theirs))

    def independent() -> Limit:
        """All at once, as by one forward."""
        case = UnmaskingCase(lambda ask: _untrained(ask, decider, gain=False), Options(LENGTH), blocks=False)
        system, ours, theirs = case.systems[0], [], []
        for seed, sampling in enumerate(SAMPLINGS):
            ours.append(case.text(system, sampling, case.decoding(system, sampling), seed=seed))
            once = Decoding(Unmask(Select("entropy", steps=1)))
            theirs.append(case.text(system, sampling, once, seed=seed))
        return Limit("with a layer that changes nothing, independent tokens", torch.tensor(ours), torch.tensor(theirs))

    options = Options(3), Options(1, "confidence")
    case = UnmaskingCase(lambda ask: _untrained(ask, decider), options[0], neutral=options[1], blocks=False)
    return replace(case, limits=(exact, independent))


class _Late(Adjusted):
    """Wrong on purpose: the sampler is given what stood in the slots one token earlier."""

    late: Tensor | None = None

    def refreshed(self, canvas: Canvas, h: Tensor, law: Target) -> Rows:
        right = self.sampler

        def sampler(e: Tensor, h: Tensor, plan: Plan) -> Tensor:
            late, self.late = self.late, e
            return right(e if late is None else late, h, plan)

        self.sampler = sampler
        found = super().refreshed(canvas, h, law)
        self.sampler = right
        return found


def case() -> UnmaskingCase:
    """For the laws."""
    return _case()


def mutant() -> UnmaskingCase:
    """The case with that."""
    return _case(_Late)
