"""What a model is trained on in a conversation: ids by its own template, and which of them are answers.

An answer is what the model must write behind its prompt: the template renders the conversation before the answer as a
prompt, and the conversation with the answer; what the second adds to the first, up to the id that ends the turn and
including it, counts. So the ids that training feeds are those that generation is given (law 7), whatever the template.

Where the template writes the beginning of a conversation alike however it goes on, all its answers share one sample.
Where it does not (it drops what was thought in earlier turns, say), each answer is a sample of its own, behind the
prompt that it would get.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.data.base import naming
from seriatim.data.conversations import Conversation, Conversations, answers
from seriatim.interop.chat import ChatTemplate
from seriatim.interop.tokenizer import PublishedTokenizer

TOGETHER = 1000  # conversations that are rendered and tokenised before the next ones are looked at


class Sample(NamedTuple):
    """Ids of a conversation, and the ranges of them that are answers."""

    ids: list[int]
    answers: list[tuple[int, int]]


@dataclass(frozen=True)
class Answers:
    """Conversations as training draws them; `notes` say what was left out or cut, `whole` how many were used."""

    samples: tuple[tuple[Int[Tensor, " n"], Bool[Tensor, " n"]], ...]
    whole: int
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "token": Int[n longest], 0 behind the end of a sample; "counts": Bool[n longest], true for answers."""
        chosen = [self.samples[i] for i in index.tolist()]
        token, counts = (torch.nn.utils.rnn.pad_sequence(list(x), True) for x in zip(*chosen, strict=True))
        return {"token": token.long(), "counts": counts}


def answers_of(
    side: Conversations, chat: ChatTemplate, tokenizer: PublishedTokenizer, ends: Collection[int], length: int
) -> Answers:
    """The samples of one side of a data set; `ends` are ids that end a turn. Of what is longer than `length` tokens the
    rest is cut off.

    Raises ValueError where nothing is left to learn from, with the reason, and where the template cannot be trusted.
    """
    samples: list[tuple[Tensor, Tensor]] = []
    refused: list[str] = []
    cut = late = used = 0
    for start in range(0, len(side), TOGETHER):
        for said in _samples_of_each(side.conversations[start : start + TOGETHER], chat, tokenizer, ends):
            if isinstance(said, str):
                refused.append(said)
                continue
            kept = [prepared for sample in said if (prepared := _prepared(sample, length)) is not None]
            cut, late = cut + any(len(s.ids) > length for s in said), late + (len(kept) < len(said))
            used += bool(kept)
            samples += kept
    notes = []
    if refused:
        reasons = list(dict.fromkeys(refused))
        notes.append(f"{len(refused):,} of {len(side):,} conversations cannot be used: {naming(reasons, 3)}")
    if cut:
        notes.append(f"{cut:,} of {len(side):,} conversations are longer than {length:,} tokens, and were cut there")
    if late:
        notes.append(f"{late:,} of {len(side):,} conversations have answers that only begin behind the cut")
    if not samples:
        raise ValueError(f"there is nothing to learn from in {len(side):,} conversations: {'; '.join(notes)}")
    return Answers(tuple(samples), used, tuple(notes))


def _prepared(sample: Sample, length: int) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]] | None:
    """A sample as tensors, cut; None where no answer is left."""
    counts = torch.zeros(len(sample.ids), dtype=torch.bool)
    for start, end in sample.answers:
        counts[start:end] = True
    counts = counts[:length]
    return (torch.tensor(sample.ids[:length], dtype=torch.int32), counts) if bool(counts.any()) else None


def _samples_of_each(
    conversations: Sequence[Conversation], chat: ChatTemplate, tokenizer: PublishedTokenizer, ends: Collection[int]
) -> list[list[Sample] | str]:
    """The samples of each conversation, or why there are none."""
    asked, turns = [], []
    for said in conversations:
        places = [n for n, message in enumerate(said) if n and answers(message)]
        turns.append(len(places))
        for n in places:
            asked += [(said[:n], True), (said[: n + 1], False)]
    texts = iter(chat.render_each(asked))
    out: list[list[Sample] | str] = []
    for count in turns:
        pairs = [(next(texts), next(texts)) for _ in range(count)]
        if not pairs:
            out.append("it begins with its only answer, which nothing asks for")
            continue
        failed = [x for pair in pairs for x in pair if isinstance(x, ValueError)]
        out.append(str(failed[0]) if failed else _samples(pairs, tokenizer, ends))  # type: ignore[arg-type]
    return out


def _samples(
    pairs: Sequence[tuple[str, str]], tokenizer: PublishedTokenizer, ends: Collection[int]
) -> list[Sample] | str:
    """Samples from the texts before and with each answer: an answer goes on with the sample before it where its ids
    begin with all of that."""
    samples: list[Sample] = []
    for prompt, whole in pairs:
        if not whole.startswith(prompt):
            return "the chat template does not write an answer behind the prompt that asks for it"
        ids, start = _continued(prompt, whole, tokenizer)
        end = _end(ids, start, ends, tokenizer)
        ids = ids[:end]
        before = samples.pop() if samples and ids[: len(samples[-1].ids)] == samples[-1].ids else Sample([], [])
        samples.append(Sample(ids, [*before.answers, (max(start, 1), end)]))
    return samples


def _continued(prompt: str, whole: str, tokenizer: PublishedTokenizer) -> tuple[list[int], int]:
    """The ids of a text that goes on from a prompt, and how many are the prompt's. Where both are tokenised together,
    the last of the prompt and the first of the rest may melt into one token; then each is tokenised by itself, as
    generation does."""
    before, together = tokenizer.encode_templated(prompt), tokenizer.encode_templated(whole)
    if together[: len(before)] == before:
        return together, len(before)
    return before + tokenizer.encode_templated(whole[len(prompt) :]), len(before)


def _end(ids: Sequence[int], start: int, ends: Collection[int], tokenizer: PublishedTokenizer) -> int:
    """Behind the first id that ends a text, or else behind the last special one, or else behind all."""
    stops = [i for i in range(start, len(ids)) if ids[i] in ends]
    special = [i for i in range(start, len(ids)) if ids[i] in tokenizer.special_ids]
    return stops[0] + 1 if stops else special[-1] + 1 if special else len(ids)
