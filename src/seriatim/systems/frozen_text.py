"""A frozen language model between maps that are trained: it reads vectors where tokens would stand.

Three ways to have it: as it was trained on text, with matrices of random numbers in their place (`random`), and not at
all (`none`); the difference between them is what the text has to do with it. The model is no part of the module that
is saved: a run holds what was trained, and loads the model from where it was.
"""

from __future__ import annotations

import hashlib
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.transformer import Transformer
from seriatim.evaluation.report import seconds_text
from seriatim.home import HOME
from seriatim.plan import Plan, plan_of
from seriatim.posttraining.drafting import Base
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.series_system import in_line
from seriatim.systems.text.next_token import Config as TextConfig
from seriatim.systems.text.next_token import NextToken
from seriatim.training.state import read_safely, write_safely
from seriatim.view import inclusive

TINY = "tiny"  # in place of a model's name: one of a few random weights, over words, for trials
WEIGHTS = ("pretrained", "random", "none")
BATCH = 128
PATIENCE = 20.0  # seconds, after which a user is told what is waited for


class FrozenText(nn.Module):
    """`source`: whatever `load` reads as a language model with a transformer; `weights`: see above; `layers`: the first
    so many of its layers (None: all). `trained`: parts of parameters' names that are trained all the same, as in
    `norm`; these alone are saved. Raises ValueError for what is no such model."""

    system: Any
    known: dict[str, Tensor]
    weights: str

    def __init__(
        self, source: str, weights: str = "pretrained", layers: int | None = None, trained: tuple[str, ...] = ()
    ):
        super().__init__()
        if weights not in WEIGHTS:
            raise ValueError(f"weights of a language model are {', '.join(WEIGHTS)}, not {weights!r}")
        system = _loaded(source)
        if not isinstance(system, LanguageModel) or not isinstance(system.model.backbone, Transformer):
            raise ValueError(
                f"{source} is {system.meta.key}: a language model that is a decoder-only transformer is read"
            )
        system.eval().requires_grad_(False)
        if weights == "random":
            redraw(system.model)
        if layers is not None:
            _cut(system.model.backbone, layers, source)
        self.weights = weights
        self.__dict__["system"] = system  # frozen, and saved apart
        self.__dict__["known"] = dict[str, Tensor]()  # states of texts
        named = system.model.backbone.named_parameters()
        chosen = {name: p.requires_grad_() for name, p in named if any(part in name for part in trained)}
        chosen |= {f"place{i}": p.requires_grad_() for i, p in enumerate(self._places()) if "place" in trained}
        self.own = nn.ParameterDict({} if weights == "none" else {n.replace(".", "_"): p for n, p in chosen.items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.system.model._apply(fn)
        self.known.update({text: fn(state) for text, state in self.known.items()})
        return self

    def _places(self) -> list[nn.Parameter]:
        return list(self.system.model.embed.positions)

    @property
    def width(self) -> int:
        return self.system.model.backbone.width

    @property
    def words(self) -> Float[Tensor, "v d"]:
        """The vectors of all tokens."""
        return Base(self.system).embed(torch.arange(self.system.model.embed.vocab, device=self.system.model.device))

    @torch.no_grad()
    def near(self, x: Float[Tensor, "n d"], count: int = 8) -> list[list[str]]:
        """The tokens whose vectors are nearest to each of these, by their cosines."""
        words = self.words
        alike = F.normalize(x, dim=-1) @ F.normalize(words - words.mean(0), dim=-1).T
        return [[self.system.tokenizer.decode([i]) for i in row] for row in alike.topk(count, dim=1).indices.tolist()]

    def ids(self, text: str) -> list[int]:
        return self.system.tokenizer.encode(text)

    def forward(self, x: Float[Tensor, "b n d"], empty: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b n d"]:
        """States behind the last norm, of vectors in a line; the vectors themselves, if there is no model. empty: how
        many of the first slots of each row hold nothing, and are not seen."""
        if self.weights == "none":
            return x
        n = x.shape[1]
        first = torch.zeros(1, dtype=torch.long) if empty is None else empty.cpu()
        place = (torch.arange(n) - first[:, None]).clamp(min=0)
        for table in self._places():
            if n > len(table):
                raise ValueError(f"this language model has {len(table)} places, and {n} are needed")
            x = x + table[place.to(table.device)]
        return self.system.model.backbone(x, in_line(n) if empty is None else behind(first, n))

    def padded(self, texts: Sequence[str]) -> tuple[Float[Tensor, "n p d"], Int[Tensor, " n"]]:
        """Vectors of the tokens of texts, filled up in front, and how many are filled up in each."""
        rows = [self.ids(text) for text in texts]
        most = max(map(len, rows))
        ids = torch.tensor([[0] * (most - len(row)) + row for row in rows], device=self.system.model.device)
        return Base(self.system).embed(ids), torch.tensor([most - len(row) for row in rows])

    # ---- texts ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """The state of the last token of each; every text is read once."""
        new = sorted({text for text in texts if text not in self.known}, key=len)
        lengths: dict[int, list[tuple[str, list[int]]]] = {}
        for text in new:
            ids = self.ids(text)
            lengths.setdefault(len(ids), []).append((text, ids))
        for some in lengths.values():
            for begin in range(0, len(some), BATCH):
                part = some[begin : begin + BATCH]
                rows = torch.tensor([row for _, row in part], device=self.system.model.device)
                for (text, _), state in zip(part, self.system.states(rows)[:, -1], strict=True):
                    self.known[text] = state.clone()
        return torch.stack([self.known[text] for text in texts])

    def learn(self, texts: Sequence[str]) -> None:
        """Read texts before they are needed, or take their states from where they were kept the last time."""
        missing = sorted({text for text in texts if text not in self.known})
        if not missing:
            return
        said = "\n".join([Base(self.system).exact_fingerprint, *missing])
        path: Path = HOME / "series" / f"texts-{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"
        if path.is_file():
            states = read_safely(path)[0]["states"].to(self.system.model.device)
        else:
            start = time.perf_counter()
            self.states(missing[:BATCH])
            left = (time.perf_counter() - start) * (len(missing) / BATCH - 1)
            if left > PATIENCE:
                warnings.warn(
                    f"the language model reads {len(missing):,} texts, which takes about {seconds_text(left)}; their "
                    f"states are kept in {path.parent}", stacklevel=2,
                )  # fmt: skip
            states = self.states(missing)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safely(path, {"states": states}, {"texts": len(missing)})
        self.known.update(zip(missing, states, strict=True))


def behind(empty: Int[Tensor, " b"], size: int) -> Plan:
    """So many slots in a line, each of which sees itself and what is before it, but for empty ones in front."""
    slot = torch.arange(size)
    view = replace(inclusive(list(range(size))), lane=torch.where(slot < empty[:, None], -1, 0))
    return plan_of(view, [0], [-1] * size, [], coord=slot[:, None])


def redraw(module: nn.Module, seed: int = 0) -> None:
    """Every matrix anew, of normal numbers with its own mean and deviation; norms and biases stay."""
    g = torch.Generator().manual_seed(seed)
    done = set[int]()
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1 and id(p) not in done:
                done.add(id(p))
                p.copy_(torch.randn(p.shape, generator=g) * p.float().std().cpu() + p.float().mean().cpu())


def _loaded(source: str) -> Any:
    if source != TINY:
        from seriatim.verbs.load import load  # which knows this file

        return load(source, "float32")
    words: Any = _Words()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NextToken(TextConfig(length=128, width=16, depth=1, heads=2, hidden=32), words)


class _Words:
    """Every four words a token, by a checksum of them."""

    def encode(self, text: str) -> list[int]:
        words = text.split()
        return [zlib.crc32(" ".join(words[i : i + 4]).encode()) % 256 for i in range(0, len(words), 4)]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"<{i}>" for i in ids)


def _cut(backbone: Any, layers: int, source: str) -> None:
    """Leave the first so many layers. Raises ValueError where there are fewer."""
    if not 1 <= layers <= len(backbone.layers):
        raise ValueError(f"{source} has {len(backbone.layers)} layers, and {layers} are asked for")
    backbone.layers = backbone.layers[:layers]
