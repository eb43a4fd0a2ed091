"""What a training leaves to look at: samples, the film of their order, the loss curve, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seriatim.data.base import Pairs
from seriatim.data.conversations import Conversation, Conversations, answers
from seriatim.evaluation.pictures import save_curve, save_grid
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.series_system import SeriesSystem
from seriatim.systems.system import evenly
from seriatim.systems.text_system import TextSystem
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.report import report
from seriatim.training.checkpoint import save_json
from seriatim.verbs.evaluate import picture_figures
from seriatim.verbs.generate import save_pictures
from seriatim.verbs.series import show_series
from seriatim.verbs.train import Trained

PROMPT = "def read(path"


def show(trained: Trained, samples: int = 0, seed: int = 0) -> dict[str, Any]:
    """Write what there is to see into the run's folder; the figures, as in summary.json.

    samples: pictures to judge (0: none are judged). Text is continued from a line of Python, a conversation or a prompt
    by an answer.
    """
    system, folder, last = trained.system, trained.folder, trained.history[-1]
    figures: dict[str, Any] = {k.removeprefix("held_out_"): v for k, v in last.items() if k.startswith("held_out_")}
    curves = [("loss", "training")]
    unit = "nats per element" if system.meta.likelihood != "none" else "loss"
    save_curve(
        {name: [h[k] for h in trained.history] for k, name in curves}, folder / "loss.png", y_label=unit, smooth=20
    )
    if isinstance(trained.data.test, Conversations):
        figures["answer"] = _answer(system, trained.data.test.conversations[0], seed)
        (folder / "answer.txt").write_text(figures["answer"], encoding="utf-8")
    elif isinstance(system, TextSystem) and isinstance(trained.data.test, Pairs):
        figures["answers"] = _answers(system, trained.data.test, seed)
        (folder / "answers.txt").write_text(figures["answers"], encoding="utf-8")
    elif isinstance(system, TextSystem):
        length = min(200, system.model.layout.size - len(system.tokenizer.encode(PROMPT)))
        figures["continuation"] = PROMPT + system.write(PROMPT, length, seed=seed)
        (folder / "continuation.txt").write_text(figures["continuation"], encoding="utf-8")
    elif isinstance(system, TokenizerSystem):
        _before_and_after(trained, folder)
        images = trained.data.test.take(evenly(len(trained.data.test), 256))["image"]  # type: ignore[union-attr]
        figures |= report(system.model, images)
    elif isinstance(system, SeriesSystem):
        figures |= show_series(system, trained.data, folder)  # type: ignore[arg-type]
    elif isinstance(system, ImageSystem):
        figures |= _pictures(trained, samples, seed)
    save_json(figures, folder / "summary.json")
    return figures


def _answer(system: Any, said: Conversation, seed: int) -> str:
    """The first turns of a conversation up to an answer, and what the model says in its place."""
    first = next(n for n, message in enumerate(said) if n and answers(message))
    ids = system.chat_ids(said[:first])
    room = min(200, system.model.layout.size - len(ids))
    s = system.sampling
    more = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
    made = system.generate(ids, max_new_tokens=room, seed=seed, **more).text if room > 0 else "(no room is left)"
    asked = "".join(f"{message['role']}: {message['content']}\n" for message in said[:first])
    return f"{asked}assistant: {made}\n"


def _answers(system: TextSystem, side: Pairs, seed: int) -> str:
    """Some prompts, each with what the model says to it, in as many tokens as the right answer has."""
    lines = []
    for i in evenly(len(side), 10).tolist():
        prompt, answer = side.pairs[i]
        length = len(system.tokenizer.encode(answer)) + len(system.stop[:1])
        lines.append(f"{prompt} {system.write(prompt, length, seed=seed + i)}\n")
    return "".join(lines)


def _pictures(trained: Trained, samples: int, seed: int) -> dict[str, Any]:
    system, data = trained.system, trained.data
    assert isinstance(system, ImageSystem)
    classes = len(data.classes) or 1
    rows = min(classes, 10)
    labels = torch.arange(rows).repeat_interleave(10)
    save_pictures(system.draw(labels, seed=seed, film=True), trained.folder, data.classes, ink=system.ink)
    return picture_figures(system, data, samples, seed)[0] if samples else {}


def _before_and_after(trained: Trained, folder: Path) -> None:
    """Held-out pictures, and below each row what the tokenizer makes of them."""
    images = trained.data.test.take(torch.arange(min(30, len(trained.data.test))))["image"]  # type: ignore[union-attr]
    tokenizer: Any = trained.system.model
    with torch.no_grad():
        again = tokenizer.decode(tokenizer.encode(images))
    whole = len(images) // 10 * 10
    rows = torch.stack([images[:whole].unflatten(0, (-1, 10)), again[:whole].unflatten(0, (-1, 10))], 1).flatten(0, 2)
    names = ["real", "rebuilt"] * (whole // 10)
    if whole:
        side = images.shape[-1]
        save_grid(
            rows,
            folder / "reconstructions.png",
            row_labels=names,
            upscale=max(1, 64 // side),
            invert=trained.system.ink,
        )
