"""Prompts of a bench as the ids a model is given: texts as they are, questions in its own template, turn after turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from seriatim.evaluation.bench import Prompt
from seriatim.evaluation.questions import Question
from seriatim.systems.generation import Generation
from seriatim.systems.language_model import LanguageModel

Phase = AbstractContextManager[Callable[[int, int], None]]
TURNS_LEFT_OUT = "the model has no chat template: of questions the first turns are given, as texts to continue"


def room(system: LanguageModel) -> int:
    """Tokens of a prompt and what is written for it together; an encoder's prompt takes none of them."""
    return system.model.layout.size


def asked(
    system: LanguageModel, questions: Sequence[Question], new: int, builtin: bool, phase: Phase
) -> tuple[list[Prompt], list[str]]:
    """Questions as prompts, and what is to be said about them. Later turns follow the greedy answers to earlier ones,
    the same for every decoder. Built-in texts lose their beginning where a model is too short for them; others raise
    ValueError that says which."""
    if system.tokenizer is None:
        raise ValueError("this model came without a tokenizer: prompts mean nothing to it")
    least = 1 if not system.continues else 2
    if new + least > room(system):
        raise ValueError(
            f"{new} new tokens are asked for, and this model takes {room(system)} in all, the prompt among them: ask "
            "for fewer"
        )
    notes = []
    if system.chat is None and any(q.chat for q in questions):
        notes.append(TURNS_LEFT_OUT)
    asks = [q.chat and system.chat is not None for q in questions]
    out: list[list[Prompt]] = [[] for _ in questions]
    for n, q in enumerate(questions):
        if not asks[n]:
            out[n].append(Prompt(tuple(system.prompt_ids(q.turns[0])), q.group))
    with phase as tell:
        _converse(system, questions, [n for n, ask in enumerate(asks) if ask], new, out, tell)
    given = [p for prompts in out for p in prompts]
    most = room(system) - new
    if builtin and system.continues:
        cut = sum(len(p.ids) > most for p in given)
        given = [Prompt(p.ids[-most:], p.group) for p in given]
        notes += [f"built-in prompts that are longer than the model takes lost their beginning: {cut}"] * bool(cut)
    elif system.continues:
        _check([len(p.ids) for p in given], most, new)
    return given, notes


def _converse(
    system: LanguageModel, questions: Sequence[Question], chats: Sequence[int], new: int, out: list[list[Prompt]],
    tell: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Turn by turn: the prompts of every conversation that has so many turns."""
    talks: dict[int, list[dict[str, str]]] = {n: [] for n in chats}
    total, done = sum(len(questions[n].turns) for n in chats), 0
    for turn in range(max((len(questions[n].turns) for n in chats), default=0)):
        going = [n for n in chats if len(questions[n].turns) > turn]
        for n in going:
            if turn:
                talks[n].append({"role": "assistant", "content": _answer(system, out[n][-1], new)})
            talks[n].append({"role": "user", "content": questions[n].turns[turn]})
            done += 1
            tell(done, total)
        assert system.chat is not None
        texts = system.chat.render_each([(talks[n], True) for n in going])
        for n, text in zip(going, texts, strict=True):
            if isinstance(text, ValueError):
                raise ValueError(f"prompt {n + 1}: {text}")
            ids = system.tokenizer.encode_templated(text)  # type: ignore[attr-defined]
            out[n].append(Prompt(tuple(ids), questions[n].group))


def _answer(system: LanguageModel, prompt: Prompt, new: int) -> str:
    """The greedy answer."""
    if system.continues:
        _check([len(prompt.ids)], room(system) - new, new)
    made = system.generate(list(prompt.ids), max_new_tokens=new, temperature=0.0)
    assert isinstance(made, Generation)
    return made.text or ""


def _check(lengths: Sequence[int], most: int, new: int) -> None:
    """Refuse prompts that are too long."""
    long = [n for n, length in enumerate(lengths) if length > most]
    if long:
        raise ValueError(
            f"{len(long)} of {len(lengths)} prompts are too long, the first is number {long[0] + 1} with "
            f"{lengths[long[0]]} tokens: with {new} new tokens this model takes prompts of {most}; leave them out, "
            "shorten them, or ask for fewer tokens"
        )
    if not all(lengths):
        raise ValueError(f"prompt {lengths.index(0) + 1} has no token")
