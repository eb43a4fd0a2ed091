"""The big little decoder in plain words and without caches, to compare with; and a run of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from seriatim.decoding.loop import Step, decode
from seriatim.decoding.target import Target
from seriatim.random import Keyed
from seriatim.systems.decoder.bild import Options, between
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.system import Sampling

GREEDY = Sampling(temperature=0)
Says = Callable[[list[int]], Tensor]  # logits behind each id


def near(model: Any, std: float) -> Any:
    """A copy that differs a little."""
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(std * p.std().nan_to_num(1.0) * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return other


def remembering(says: Says) -> Says:
    """Loops over the same texts ask the same again."""
    told = cache(lambda *ids: says(list(ids)))
    return lambda ids: told(*ids)


def run(
    models: tuple[Any, Any], options: Options, new: int, rows: Sequence[Sequence[int]], sampling: Sampling = GREEDY,
    stop: tuple[int, ...] = (),
) -> tuple[list[list[int]], list[Step], Decoding, Target]:  # fmt: skip
    """New tokens of each row, and how they came about."""
    large, small = models
    way = between(Ask(large, sampling, stop, None, options), small)
    target = large.target(None, sampling)
    canvas = large._begun(rows, new)
    with torch.inference_mode():
        steps = list(decode(target, canvas, way.decider, way.proposer, Keyed(0)))
    ends = canvas.lengths().tolist()
    texts = [v[len(r) : end] for v, r, end in zip(canvas.value["token"].tolist(), rows, ends, strict=True)]
    return texts, steps, way, target


def as_corrected(
    large: Says, small: Says, ids: Sequence[int], total: int, confidence: float, most: float, turns: int = 10
) -> tuple[list[int], dict[str, int]]:
    """The loop with the rule that is exact where no loss is tolerated; how often the large model went back, how often
    the small one was unsure, and how many tokens stood that the large one would not have written."""
    ids, told = list(ids), {"back": 0, "unsure": 0, "stood": 0}
    while len(ids) < total:
        start = len(ids)
        while len(ids) - start < turns and len(ids) < total - 1:  # the large model writes one at least
            p = torch.softmax(small(ids)[-1], -1)
            if float(p.max()) < confidence:
                told["unsure"] += 1
                break
            ids.append(int(p.argmax()))
        said = torch.log_softmax(large(ids), -1)
        for place in range(start, len(ids)):
            best = int(said[place - 1].argmax())
            if ids[place] == best:
                continue
            if float(-said[place - 1, ids[place]]) > most:
                ids, told["back"] = [*ids[:place], best], told["back"] + 1
                break
            told["stood"] += 1
        else:
            ids.append(int(said[-1].argmax()))
    return ids, told


def as_released(
    large: Says, small: Says, ids: Sequence[int], total: int, confidence: float, most: float, turns: int = 10,
    stop: Collection[int] = (),
) -> tuple[list[int], dict[str, int]]:  # fmt: skip
    """The loop of the released code; how often it went back, how often it spared a draft whose first unlikely token was
    the likeliest though a later one was not, and how often the small model ended the text, unread."""
    ids, seen, by_large, left = list(ids), len(ids) - 1, True, 1
    told = {"back": 0, "spared": 0, "unsure": 0, "ended": 0}
    while len(ids) < total:
        if not by_large:
            p = torch.softmax(small(ids)[-1], -1)
            if float(p.max()) < confidence:
                by_large, told["unsure"] = True, told["unsure"] + 1
                continue
            ids.append(int(p.argmax()))
            if ids[-1] in stop:
                told["ended"] += 1
                break
            left -= 1
            by_large = left == 0
            continue
        rows = large(ids)[seen:]
        written = torch.tensor(ids[seen + 1 :])
        if len(written):
            loss = torch.nn.functional.cross_entropy(rows[:-1], written, reduction="none")
            over = loss > most
            if bool(over.any()):
                first = int(over.int().argmax())
                best = int(rows[first].argmax())
                if best != int(written[first]):
                    ids, told["back"] = [*ids[: seen + 1 + first], best], told["back"] + 1
                    continue  # still the large model's turn, which has remembered nothing of this
                told["spared"] += bool((over & (rows[:-1].argmax(-1) != written)).any())
        ids.append(int(rows[-1].argmax()))
        if ids[-1] in stop:
            break
        seen, by_large, left = len(ids) - 1, False, turns
    return ids, told
