"""What steering by a classifier does: code or prose, as another classifier and a next-token model find it, and what it
costs by one gradient and by trying every token."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from seriatim.data.base import share
from seriatim.data.stdlib import docstrings, source_files
from seriatim.decoding.loop import decode
from seriatim.decoding.steering import Steering
from seriatim.evaluation.metrics import token_entropy
from seriatim.home import HOME
from seriatim.posttraining.classifier import CLASSIFYING, Classifying, Labelled, MaskedClassifier
from seriatim.random import Keyed
from seriatim.systems.text_system import TextSystem
from seriatim.tokenizers.text import id_stream
from seriatim.training.checkpoint import load_weights
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.trainer import train

CLASSES = ("code", "prose")  # source files with their docstrings in them, and docstrings alone


def labelled(system: TextSystem, window: int, part: int) -> Labelled:
    """Windows of the standard library, of code and of prose. part: 0 or 1, halves of the files by a hash of their
    paths, so that two classifiers learn from other texts; 2: files that are held out of both."""
    ids, label = [], []
    for number, files in enumerate((source_files(), docstrings())):
        some = [text for name, text in files if _part(name) == part]
        stream = id_stream(system.tokenizer, some, system.stop[:1])
        rows = stream[: len(stream) // window * window].view(-1, window)
        ids.append(rows)
        label.append(torch.full((len(rows),), number))
    fewest = min(map(len, ids))  # classes are equally frequent
    picked = [torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:fewest] for x in ids]
    return Labelled(
        torch.cat([x[i] for x, i in zip(ids, picked, strict=True)]),
        torch.cat([x[i] for x, i in zip(label, picked, strict=True)]),
    )


def _part(name: str) -> int:
    place = share(name)
    return 2 if place < 0.05 else int(share(name + " half") < 0.5)


def classifier(system: TextSystem, part: int, window: int = 64, recipe: Recipe = CLASSIFYING) -> MaskedClassifier:
    """Trained on its half where there is none yet, and kept under SERIATIM_HOME."""
    torch.manual_seed(part)
    vocab: int = system.model.heads["token"].vocab  # type: ignore[assignment]
    made = MaskedClassifier(vocab, len(CLASSES))
    folder = RunFolder(HOME / "claims" / "steering" / f"{vocab}-{window}-{recipe.steps}-{part}")
    if not (folder.path / "finished").is_file():
        sides = labelled(system, window, part), labelled(system, window, 2)
        train(Classifying(made), sides[0], recipe, folder, {"part": part}, sides[1], resume=True)
        (folder.path / "finished").touch()
    load_weights(made, folder.weights)
    return made.eval().requires_grad_(False)


@torch.inference_mode()
def steered(
    system: TextSystem, steering: Steering, other: MaskedClassifier, judge: TextSystem | None = None, texts: int = 16,
    new: int = 64, temperature: float = 1.0, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Texts from nothing: how many of them another classifier finds in the class that was wanted, nats a token by a
    next-token model of the same vocabulary, entropy of the tokens, and seconds."""
    sampling = replace(system.sampling, temperature=temperature, top_p=None)
    canvas = system.begun([], new).select(torch.zeros(texts, dtype=torch.long))
    canvas.row = torch.arange(texts)
    start = time.perf_counter()
    target = system.target(None, sampling, steer=steering)
    forwards = sum(1 for _ in decode(target, canvas, system.decider(sampling), random=Keyed(seed)))
    seconds = time.perf_counter() - start
    ids = canvas.value["token"]
    said = other.log_prob(other.vectors(ids, torch.ones_like(ids).bool())).argmax(1)
    found: dict[str, Any] = {
        "rate": float((said == torch.as_tensor(steering.label)).double().mean()), "seconds": seconds,
        "forwards": forwards, "entropy": token_entropy(ids.tolist()),
        "texts": [system.tokenizer.decode(row) for row in ids[:2].tolist()],
    }  # fmt: skip
    if judge is not None:
        law = torch.log_softmax(judge.logits(ids)[:, :-1].float(), -1)  # type: ignore[attr-defined, operator]
        found["nats_per_token"] = -float(law.gather(-1, ids[:, 1:, None]).mean())
    return found


def sweep(
    system: TextSystem, judge: TextSystem | None, weights: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0),
    guide: MaskedClassifier | None = None, other: MaskedClassifier | None = None, **more: Any,
) -> list[Mapping[str, Any]]:  # fmt: skip
    """Both classes by weights; and one text with exact guidance, beside the same to first order."""
    guide, other = guide or classifier(system, 0), other or classifier(system, 1)
    rows: list[Mapping[str, Any]] = []
    for label, name in enumerate(CLASSES):
        for weight in weights:
            found = steered(system, Steering(guide, label, weight), other, judge, **more)
            rows.append({"class": name, "weight": weight, "exact": False, **found})
    for exact in (False, True):
        found = steered(system, Steering(guide, 0, weights[-1], exact), other, judge, **{**more, "texts": 1})
        rows.append({"class": CLASSES[0], "weight": weights[-1], "exact": exact, **found})
    return rows
