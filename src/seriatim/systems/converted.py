"""A published next-token model turned into one that decides masks, in any order or block after block, to be trained on:
only mask and loss change (DiffuLLaMA, Gong et al. 2024; SDAR, 2025).

The result is published as its base was, with one more entry in config.json that says so, and is read again from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families import CONVERTED, masked_as
from seriatim.systems.published import Published
from seriatim.systems.published_masked import PublishedMasked

SPARE = ("<mask>", "[MASK]", "<|mask|>", "<|MASK|>", "<unk>", "<|fim_pad|>", "<pad>")  # ids that a text can do without


def mask_id(base: Published, wanted: str | int | None) -> int:
    """The id whose row stands for the mask: what is asked for, or one that texts can do without. It is never written
    again. Raises ValueError where there is none."""
    vocab, inner = base.config.vocab, getattr(base.tokenizer, "inner", None)
    if isinstance(wanted, int) or (isinstance(wanted, str) and wanted.isdigit()):
        if not 0 <= int(wanted) < vocab:
            raise ValueError(f"the mask is id {wanted}, and there are {vocab:,} ids")
        return int(wanted)
    known = () if inner is None else [(t, i) for t in ([wanted] if wanted else SPARE) if (i := inner.token_to_id(t))]
    known = [(t, i) for t, i in known if i not in base.stop]
    if known:
        return known[0][1]
    if wanted is None and inner is not None and inner.get_vocab_size() < vocab:
        return vocab - 1  # a row that no text reaches
    said = f"there is no token {wanted!r}" if wanted else "no token is spare"
    raise ValueError(f"{said} in this model: name one that texts can do without (--mask TOKEN, or its id)")


def converted(base: Any, block: int | None, mask: str | int | None = None) -> PublishedMasked:
    """The same weights, of which the row of the mask stands where a token is unknown. block: how many tokens are
    decided together (None: all, in any order). Raises ValueError for a model that cannot be one."""
    if type(base) is not Published or not isinstance(base.config, Blueprint):
        raise ValueError(f"{base.meta.key} is no next-token model of its own, and decides no masks")
    if block is not None and not 1 <= block <= base.config.length:
        raise ValueError(f"a block holds 1 to {base.config.length:,} tokens, got {block}")
    how = {"mask": mask_id(base, mask), "block": block}
    return as_masked(base, how)


def as_masked(base: Published, how: Mapping[str, Any]) -> PublishedMasked:
    """The same by what config.json says of it."""
    plan = masked_as(base.config, how, base.meta.key)
    with torch.device("meta"):
        model = plan.build()
    weights: dict[str, Any] = dict(base.model.state_dict())
    weights["embed.mask"] = weights["embed.table"][plan.mask].clone()
    model.load_state_dict(weights, assign=True)
    if plan.tied:
        model.heads["token"].weight = model.embed.table  # type: ignore[union-attr, assignment]
    raw = {**base.raw, CONVERTED: dict(how)}
    system = PublishedMasked(plan, model, base.tokenizer, raw, base.settings, base.chat)  # type: ignore[arg-type]
    return system.eval().requires_grad_(False)
