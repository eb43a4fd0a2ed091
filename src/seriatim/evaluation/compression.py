"""What compressed keys and values cost and save: texts are read in parts, over caches by codecs and over the exact one.

Every part reads all earlier ones as the cache remembers them, and itself as it is, which is what decoding does with
blocks and buffer. All codecs read the same parts of the same texts, so that differences between them are no noise of
texts. The first part is left out: there is nothing behind it that could be compressed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.backbones.compressed import Codec
from seriatim.layout import line

LETTERS = 8  # of a token, at most on average: no more of a long document is tokenised


@dataclass
class Cost:
    """Of a codec, over all texts: sums over tokens, and the most that one text's cache took.

    nats: of the text's own tokens; excess: how much less likely they are than with the exact cache; divergence: of the
    exact law from this one (Kullback-Leibler, nats); agreed: tokens whose likeliest is that of the exact law; kept:
    bytes of a whole text's cache, of `numbers` numbers, by what they hold in `parts`; peak: the most bytes at once,
    what is pending and what a layer decodes included.
    """

    tokens: int = 0
    nats: float = 0.0
    excess: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    kept: int = 0
    numbers: int = 0
    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Perplexity, its change (the exact cache: 1), and so on, for a table."""
        nats, excess = torch.tensor([self.nats, self.excess], dtype=torch.float64) / self.tokens
        return {
            "perplexity": float(nats.exp()), "times exact": float(excess.exp()), "excess nats": float(excess),
            "divergence": self.divergence / self.tokens, "greedy agreement": self.agreed / self.tokens,
            "bits a number": 8 * self.kept / self.numbers, "cache bytes": self.kept, "peak bytes": self.peak,
        }  # fmt: skip


def contexts(system: Any, documents: Sequence[str], length: int, count: int, seed: int = 0) -> list[list[int]]:
    """The first `length` tokens of at most `count` documents that have so many, drawn by a seed."""
    out: list[list[int]] = []
    for text in random.Random(seed).sample(documents, len(documents)):
        ids = system.tokenizer.encode(text[: LETTERS * length]) if len(out) < count else []
        if len(ids) >= length:
            out.append(ids[:length])
    return out


def costs(
    system: Any, texts: Sequence[Sequence[int]], codecs: Mapping[str, Codec | None], part: int = 64, width: int = 2
) -> dict[str, Cost]:
    """Read texts (ids) by a next-token language model, `part` tokens a forward, over each of these caches (None: the
    exact one). width: bytes of a number that is kept exactly. Raises ValueError for texts of one part or less."""
    if min(map(len, texts), default=0) <= part:
        raise ValueError(f"texts of more than {part} tokens are needed, so that there is something behind the first")
    out = {name: Cost() for name in codecs}
    with torch.inference_mode():
        for ids in texts:
            caches = {name: new_cache(system.model, codec, len(ids)) for name, codec in codecs.items()}
            exact = read(system, ids, new_cache(system.model, None, len(ids)), part)
            for (best, target), *laws in zip(
                exact, *(read(system, ids, c, part) for c in caches.values()), strict=True
            ):
                for (name, cache), (law, _) in zip(caches.items(), laws, strict=True):
                    _count(out[name], best, law, target)
                    held = sizes(cache, codecs[name], width)
                    out[name].peak = max(out[name].peak, sum(held.values()))
            for name, cache in caches.items():
                held = sizes(cache, codecs[name], width)
                del held["decoded"]
                out[name].parts, out[name].kept = held, sum(held.values())
                out[name].numbers = cache.columns * numbers_a_column(cache, codecs[name])
    return out


def read(
    system: Any, ids: Sequence[int], cache: Any, part: int
) -> Iterator[tuple[Float[Tensor, "n v"], Int[Tensor, "n"]]]:
    """Part by part behind the first: the law of each next token, and the tokens; the part is pending in the cache."""
    model, device = system.model, system.model.device
    canvas = model.canvas({"token": torch.tensor([list(ids)])}, len(ids), layout=line(len(ids)))
    while (plan := model.factorization.fill(canvas, cache.length, part)) is not None:
        h = model.hidden(plan, canvas, cache, system._encoded())
        first = plan.base - model.factorization.prefix + 1
        if plan.base:
            law = F.log_softmax(model.heads["token"].logits(h)[0].float(), -1)
            yield law, torch.tensor(ids[first : first + plan.size], device=device)
        cache.commit(plan.size, plan)


def new_cache(model: Any, codec: Codec | None, slots: int) -> Any:
    """An empty cache for one row of so many slots."""
    return model.new_cache(1, slots) if codec is None else model.new_cache(1, codec.buffer).compressed(codec, slots)


def _count(cost: Cost, exact: Tensor, law: Tensor, target: Tensor) -> None:
    said, best = (x.gather(1, target[:, None]).sum().item() for x in (law, exact))
    cost.tokens += len(target)
    cost.nats -= said
    cost.excess += best - said
    cost.divergence += (exact.exp() * (exact - law)).sum().item()
    cost.agreed += int((exact.argmax(1) == law.argmax(1)).sum())


def sizes(cache: Any, codec: Codec | None, width: int) -> dict[str, int]:
    """Bytes of a cache by what they hold: blocks by part, "exact" entries, pending ones included, of `width` bytes a
    number, and what a forward decodes at once: one layer, half of it twice."""
    latest, column = cache if codec is None else cache.latest, numbers_a_column(cache, codec)
    exact = column * (latest.columns + latest.pending) * width
    if codec is None:
        return {"exact": exact, "decoded": 0}
    decoded = 3 * column * (cache.columns + latest.pending) * width // (2 * len(latest.buffer)) if cache.behind else 0
    return {**cache.sizes(), "exact": exact, "decoded": decoded}


def numbers_a_column(cache: Any, codec: Codec | None) -> int:
    """Of all layers, keys and values, of one row."""
    layers, two, _, heads, _, channels = (cache if codec is None else cache.latest).buffer.shape
    return layers * two * heads * channels
