"""ADED: a table of tri-grams that adapts to the text, searched for the draft.

New: the draft comes from what followed pairs of tokens in a corpus, and adapts while the text grows: its last
tri-grams are raised at every step. A Monte-Carlo tree search turns the table into a tree, which is verified in one
forward (Liu et al. 2024). `write_table` counts the table of a corpus, `aded:stdlib` has that of the standard library,
and without one (`aded` alone) everything is learned from prompt and output.

Unlike the released code, which tests each path by a draw of its own and so is not exact at temperatures above 0, tokens
are drawn once and matched. `search=best-first` takes the nodes of largest path probability instead: it is faster, and
finds the better tree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seriatim.data.base import load_data
from seriatim.decoding.tree_search import MonteCarlo, Search, SearchedDraft, beam, best_first
from seriatim.decoding.trigrams import WIDTH, Adapted, TrigramTable, no_trigrams, trigram_table
from seriatim.decoding.verify import Walk
from seriatim.home import HOME
from seriatim.laws.decoders import DecoderCase, credulous
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import KEPT, Ask, Decoding
from seriatim.systems.meta import Meta
from seriatim.systems.trials import tokens_per_forward
from seriatim.training.state import read_safely, write_safely

META = Meta(
    key="aded",
    title="ADED",
    family="decoder",
    modality="text",
    paper="Adaptive Draft-Verification for Efficient Large Language Model Decoding (2024), arXiv 2407.12021",
    likelihood="lossless",
    summary="Drafts by a search in a table of tri-grams that adapts to the text; nothing is trained.",
)

PROBE = "def f(x):\n    return x['key'] + 1  # three naïve words, 2024\n"  # tells tokenizers apart
TENSORS = ("pair", "start", "token", "chance")
LIBRARY = "stdlib"  # the data set whose tri-grams are counted when they are asked for


@dataclass(frozen=True)
class Options:
    """nodes, depth: of the tree; search: mcts, best-first or beam; iterations, value: of `MonteCarlo`; bonus: by which
    a tri-gram of the last `window` tokens is raised at each step; hot: go on with what was learned from earlier
    generations of this model (pays without a table; with one, other texts mislead more than they help)."""

    nodes: int = 12
    depth: int = 4
    search: str = "mcts"
    iterations: int = 40
    value: str = "last"
    bonus: float = 0.04
    window: int = 16
    hot: bool = False


def decoder(ask: Ask) -> Decoding:
    """Search, then sample and match. The source is a file of `write_table`, or "stdlib": the standard library's
    tri-grams, counted at the first use."""
    o = ask.options

    def fresh() -> Adapted:
        return Adapted(no_trigrams(ask.vocab) if ask.source is None else _read_once(ask), o.bonus)

    adapted = ask.learned(fresh) if o.hot else fresh()
    return Decoding(Walk(ask.stop), SearchedDraft(adapted, _search(o), o.nodes, o.depth, o.window))


def _search(o: Options) -> Search:
    if o.search == "mcts":
        return MonteCarlo(o.iterations, value=o.value)  # type: ignore[arg-type]
    found = {"best-first": best_first, "beam": beam}.get(o.search)
    if found is None:
        raise ValueError(f"search is mcts, best-first or beam, not {o.search!r}")
    return found


# ---- tables of a corpus ----------------------------------------------------------------------------------------------


def write_table(
    system: Any, documents: Iterable[str], path: str | Path, width: int = WIDTH, least: int = 1
) -> TrigramTable:
    """Count the tri-grams of texts as this model reads them, and write them to a safetensors file, which is then named
    as `aded:FILE`. least: leave out what occurs less often. Raises ValueError for a model without a tokenizer, OSError
    where nothing can be written."""
    probe = _probe(system)
    vocab = system.model.heads["token"].vocab
    table = trigram_table((system.tokenizer.encode(text) for text in documents), vocab, width, least)
    about = {"trigrams": 1, "vocab": vocab, "probe": probe}
    write_safely(Path(path), {name: getattr(table, name) for name in TENSORS}, about)
    return table


def read_table(system: Any, path: str | Path) -> TrigramTable:
    """What `write_table` wrote for a model of the same tokenizer. Raises FileNotFoundError, and ValueError for another
    file or tokenizer."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no table of tri-grams {path}; count one by seriatim.systems.decoder.aded.write_table(model, "
            "texts, FILE), or leave it out to learn from prompt and output alone"
        )
    tensors, about = read_safely(Path(path))
    if about.get("trigrams") != 1 or set(tensors) != set(TENSORS):
        raise ValueError(f"{path} is no table of tri-grams, as write_table makes them")
    vocab = system.model.heads["token"].vocab
    if about.get("vocab") != vocab or about.get("probe") != _probe(system):
        raise ValueError(
            f"{path} was counted with another tokenizer: of {about.get('vocab')} ids, and this model has {vocab}; a "
            f"probe is {about.get('probe')} there and {_probe(system)} here. Count it anew with this model's"
        )
    table = TrigramTable(vocab, *(tensors[name] for name in TENSORS))
    _check(table, path)
    return table


def library_table(system: Any) -> Path:
    """The tri-grams of the standard library's training side as this model reads it: counted once, in half a minute,
    and kept under SERIATIM_HOME. Raises as `write_table`."""
    name = hashlib.sha256(repr((system.model.heads["token"].vocab, _probe(system))).encode()).hexdigest()[:16]
    path = HOME / "trigrams" / f"{LIBRARY}-{name}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(system, load_data(LIBRARY, "text").train.documents, path)
    return path


def _read_once(ask: Ask) -> TrigramTable:
    """The table of a file that stays the same is read once for a model."""
    path = library_table(ask.system) if ask.source == LIBRARY else Path(ask.source or "").expanduser()
    key = (TrigramTable, path.resolve(), path.stat().st_mtime_ns if path.is_file() else 0)
    kept = KEPT.setdefault(ask.system.model, {})
    if key not in kept:
        kept[key] = read_table(ask.system, path)
    return kept[key]


def _probe(system: Any) -> list[int]:
    """How a tokenizer writes a text that shows its ways."""
    if system.tokenizer is None:
        raise ValueError("this model came without a tokenizer: tri-grams of texts mean nothing to it")
    return list(system.tokenizer.encode(PROBE))


def _check(table: TrigramTable, path: str | Path) -> None:
    """Refuse a file that was damaged or made up."""
    pair, start, token, chance = (getattr(table, name) for name in TENSORS)
    kinds = pair.dtype == start.dtype == torch.int64 and token.dtype == torch.int32 and chance.dtype == torch.float32
    sound = kinds and all(x.dim() == 1 for x in (pair, start, token, chance)) and len(start) == len(pair) + 1
    sound = sound and len(token) == len(chance) == int(start[-1]) and int(start[0]) == 0
    sound = sound and bool((start.diff() > 0).all() and (pair.diff() > 0).all() and (chance > 0).all())
    if sound and len(token):
        sound = 0 <= int(token.min()) <= int(token.max()) < table.vocab and bool((chance <= 1).all())
    if not sound:
        raise ValueError(f"{path} is damaged: what it holds is no table of tri-grams; count it anew")


# ---- the claim -------------------------------------------------------------------------------------------------------


def _trial(decoder: str) -> Trial:
    """On many short texts: what is easy to draft differs more from text to text than from decoder to decoder."""
    return Trial("zoo:text-base", tokens_per_forward(decoder, prompts=96, new_tokens=96))


CLAIM = Claim(
    text="A table of tri-grams that adapts to the text gives more tokens a forward than the same table as it is.",
    paper="up to 2.5 times as fast as plain decoding; the acceptance rate rises while the table adapts (section 4)",
    metric="tokens_per_forward",
    arms={
        "adapts": _trial("aded:stdlib"),
        "static": _trial("aded:stdlib+bonus=0"),
        "first token's value": _trial("aded:stdlib+value=first"),
        "best first": _trial("aded:stdlib+search=best-first"),
        "static beam": _trial("aded:stdlib+search=beam+bonus=0"),
        "hot": _trial("aded:stdlib+hot=true"),
        "no table": _trial("aded"),
    },
    ours="adapts",
    baseline="static",
    better="higher",
    seeds=(10, 11),  # prompts that no setting was tried on
    spread_seeds=(10, 11, 12, 13, 14),
)


# ---- for the laws ----------------------------------------------------------------------------------------------------


def case() -> DecoderCase:
    """For the laws: a small tree, and a search that draws."""
    return DecoderCase(decoder, Options(nodes=5, iterations=12))


def mutant() -> DecoderCase:
    """Accepts whatever is drafted."""
    return DecoderCase(credulous, Options())
