"""Trained parts that draft: found by the source a user names, and kept while their base lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seriatim.interop.draft_heads import load_published_heads, published_heads
from seriatim.posttraining.drafting import CARD, WEIGHTS, Base, P, Part, load_part, read_card
from seriatim.systems.decoders import KEPT, Ask
from seriatim.systems.trials import tokens_per_forward


def draft_part(ask: Ask, kind: type[P], pickled: bool = False) -> tuple[P, Base]:
    """The part that the source of a decoder names, and the base as it sees it: a folder that `train` wrote, published
    heads, or "zoo", the part that ships for this model. One folder is read once as long as its files stay the same.

    pickled: read published .pt files too. Raises ValueError, OSError that says what is wrong.
    """
    base = Base(ask.system)
    if ask.source is None:
        raise ValueError(
            f"name the folder of what was trained behind the decoder, as in {kind.key}:runs/{kind.key}, or "
            f"{kind.key}:zoo for what ships with the model; {kind.made_by()} trains it"
        )
    folder = _shipped(base, kind) if ask.source == "zoo" else Path(ask.source).expanduser()
    file = folder / WEIGHTS if (folder / CARD).is_file() else published_heads(folder, kind.key)
    if file is None or not file.is_file():
        raise FileNotFoundError(
            f"there is no trained {kind.key} in {folder}: give a folder that {kind.made_by()} wrote (with "
            f"{CARD} and {WEIGHTS}), or {kind.key}:zoo"
        )
    kept = KEPT.setdefault(ask.system.model, {})
    key = (kind, folder.resolve(), file.stat().st_mtime_ns, base.dtype, base.device)
    if key not in kept:
        ours = (folder / CARD).is_file()
        kept[key] = load_part(folder, base, kind) if ours else load_published_heads(file, base, kind.key, pickled)
    return kept[key], base


def _shipped(base: Base, kind: type[Part]) -> Path:
    """The folder of the zoo with a part for this very base. Raises FileNotFoundError that says for which there are."""
    from seriatim.verbs.load import ZOO

    cards = {p.parent: read_card(p.parent) for root in ZOO for p in sorted(root.glob(f"*/draft-{kind.key}/{CARD}"))}
    for folder, card in cards.items():
        if base.is_of(card):
            return folder
    there = ", ".join(dict.fromkeys(card["base"]["name"] for card in cards.values())) or "no model yet"
    raise FileNotFoundError(
        f"the zoo has {kind.key} for {there}, and this model is {base}: {kind.made_by()} trains one"
    )


def drafted_lengths(trained: Any, options: str = "") -> dict[str, Any]:
    """Tokens a forward by a part that was just trained, and what it is: judges the arms of claims. options: of the
    decoder, as in +nodes=12."""
    card = read_card(trained.folder)
    facts = card["training"]
    known = {name: facts[name] for name in ("parameters", "held_out_loss") if name in facts}
    return {**tokens_per_forward(f"{card['key']}:{trained.folder}{options}")(trained.system, 0), **known}
