"""What claims of decoders of tokens in any order are measured on: answers of a small model that was taught them, and
how far texts agree with those that are decided one token at a time.

Answers are filled up with ends of text to one length, so the model has to find out how long they are, and learns to be
sure of ends. It is trained once, in minutes, and kept under SERIATIM_HOME.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.data.base import load_data
from seriatim.home import HOME
from seriatim.layout import line
from seriatim.posttraining.parallel import begun, one_by_one, written
from seriatim.posttraining.states import Tokens, windows
from seriatim.systems.decoders import Decoding, decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.tokenizers.text import id_stream
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.trainer import train

# ---- what is answered ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Problems with one right answer each. make: draws a prompt and its answer; prompt, answer: most tokens of either,
    the end included."""

    make: Callable[[random.Random], tuple[str, str]]
    prompt: int
    answer: int


def _list(rng: random.Random) -> tuple[str, str]:
    """Letters to copy, to reverse, or to write as often as is said: answers of 1 to 20 letters."""
    kind = rng.choice("=<*")
    if kind == "*":
        pairs = [(rng.choice("abcdefgh"), rng.randint(1, 5)) for _ in range(rng.randint(1, 4))]
        return kind + "".join(f"{letter}{n}" for letter, n in pairs), "".join(letter * n for letter, n in pairs)
    letters = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 12)))
    return kind + letters, letters if kind == "=" else letters[::-1]


def _written_out(rng: random.Random) -> tuple[str, str]:
    """Letters, each as often as is said, a line each: answers of 2 to 4 lines of 2 to 7 letters."""
    pairs = [(rng.choice("abcdefgh"), rng.randint(1, 6)) for _ in range(rng.randint(2, 4))]
    return "".join(f"{letter}{n}" for letter, n in pairs), "".join(letter * n + "\n" for letter, n in pairs)


TASKS = {"lists": Task(_list, 16, 24), "lines": Task(_written_out, 8, 29)}


def problems(task: Task, count: int, seed: int, test: bool = False) -> list[tuple[str, str]]:
    """So many, the same for a seed. Those that begin a hash in eight are for tests only."""
    rng = random.Random(f"{seed} {test}")
    found: list[tuple[str, str]] = []
    while len(found) < count:
        one = task.make(rng)
        if (sum(map(ord, one[0])) % 8 == 0) == test:
            found.append(one)
    return found


def as_ids(task: Task, tokenizer: Any, some: list[tuple[str, str]]) -> Int[Tensor, "n length"]:
    """Prompts behind spaces, answers before ends of text."""
    end, rows = tokenizer.special["eos"], []
    for prompt, answer in some:
        ids = tokenizer.encode(prompt.rjust(task.prompt) + answer)
        rows.append(ids + [end] * (task.prompt + task.answer - len(ids)))
    return torch.tensor(rows)


class Taught(MDLM):
    """Prompts of one length are given, and answers learned."""

    prompt = 0

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, None]:
        ids = batch["token"]
        return self.model.canvas({"token": ids}, self.prompt, layout=line(ids.shape[1])), None


RECIPE = Recipe(1500, batch=64, learning_rate=2e-3, weight_decay=0.1, bf16=True)
SHAPE: Mapping[str, Any] = {"width": 128, "depth": 4, "heads": 4}


def taught(name: str, recipe: Recipe = RECIPE, shape: Mapping[str, Any] = SHAPE, count: int = 50_000) -> MDLM:
    """A masked model that answers a task, trained where there is none yet."""
    from seriatim.verbs.load import load, plain

    task = TASKS[name]
    folder = HOME / "claims" / "taught" / f"{name}-{recipe.steps}-{shape['width']}"
    if not (folder / "finished").is_file():
        torch.manual_seed(recipe.seed)
        config = Config(length=task.prompt + task.answer, **shape, short=0.0, block=None)
        system: Any = Taught(config)
        system.prompt = task.prompt
        ids = as_ids(task, system.tokenizer, problems(task, count, 0))
        card = {"system": "mdlm", "config": plain(config), "recipe": plain(recipe), "classes": []}
        train(system, Tokens(ids), recipe, RunFolder(folder), card, resume=True)
        (folder / "finished").touch()
    return load(folder)  # type: ignore[return-value]


def answers_of(
    task: str, spec: str, steps: int | None = None, count: int = 500
) -> Callable[[Any, int], Mapping[str, Any]]:
    """A measure of a `Trial`, by the taught model in place of the one that is loaded: how many held-out problems, drawn
    by the seed, a decoder answers right (`accuracy`), tokens by which answers are too long or short on the mean
    (`length_error`), and forwards for each."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        model = taught(task)
        return answered(model, TASKS[task], problems(TASKS[task], count, 1000 + seed, test=True), spec, steps)

    return measure


def answered(
    model: MDLM, task: Task, some: list[tuple[str, str]], spec: str | Decoding, steps: int | None = None
) -> dict[str, float]:
    """The figures of `answers_of`."""
    right = error = forwards = 0.0
    for part in torch.arange(len(some)).split(50):
        batch = [some[i] for i in part.tolist()]
        prompts = as_ids(task, model.tokenizer, batch)[:, : task.prompt]
        way = decoder_of(model, spec, Sampling(temperature=0, steps=steps))
        ids, taken = by(model, prompts, task.answer, way)
        for row, (_, answer) in zip(ids[:, task.prompt :].tolist(), batch, strict=True):
            end = next((i for i, x in enumerate(row) if x in model.stop), len(row))
            right += model.tokenizer.decode(row[:end]) == answer
            error += abs(end - len(answer))
        forwards += float(taken.sum())
    n = len(some)
    return {"accuracy": right / n, "length_error": error / n, "forwards": forwards / n}


def by(model: Any, prompts: Int[Tensor, "b p"], new: int, way: Decoding) -> tuple[Int[Tensor, "b E"], Int[Tensor, "b"]]:
    """Texts by a decoder, greedily, and forwards of each."""
    ids, forwards, _ = written(model, begun(model, prompts, new, way.block), way.decider, **way.target)
    return ids, forwards


# ---- agreement with one token at a time ------------------------------------------------------------------------------

AGREEMENT = 0.8  # of the tokens


def held_out(system: Any, count: int, window: int, seed: int = 0) -> Int[Tensor, "n p"]:
    """Prompts from held-out files of the standard library."""
    ids = id_stream(system.tokenizer, load_data("stdlib", "text").test.documents, system.stop[:1])
    every = windows(ids, window, len(ids))
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count]].long()


def most_parallel(
    system: Any, prompts: Int[Tensor, "b p"], new: int, block: int | None, ways: Mapping[str, Callable[[], Decoding]]
) -> dict[str, Any]:
    """Of several settings of a decoder the one that writes most tokens by a forward while at least `AGREEMENT` of them
    are those that the model writes one at a time; where none does, that is what is left, at 1. All are told."""
    want = one_by_one(system, prompts, new, block)[:, prompts.shape[1] :]
    told: dict[str, Any] = {"tokens_per_forward": 1.0, "agreement": 1.0, "setting": "one token at a time"}
    for name, make in ways.items():
        ids, forwards = by(system, prompts, new, make())
        agreement = float((ids[:, prompts.shape[1] :] == want).double().mean())
        speed = want.numel() / int(forwards.sum())
        told[f"{name}: agreement"], told[f"{name}: tokens_per_forward"] = agreement, speed
        if agreement >= AGREEMENT and speed > told["tokens_per_forward"]:
            told |= {"tokens_per_forward": speed, "agreement": agreement, "setting": name}
    return told
