"""The judge of judge decoding (Bachmann et al. 2025, arXiv 2501.19309): a linear map on a deep state of a token, which
says whether the text is right up to it.

It learns from answers of which some have an error. Tokens before the error are good, those of the error are not, and
what follows is not asked about. The states are computed once; the fit is a logistic regression, solved to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.decoding.judge import Look
from seriatim.posttraining.drafting import Base, Part

GOOD, WRONG, UNASKED = 1, 0, -1


@dataclass(frozen=True)
class JudgeConfig:
    """layer: whose states are judged, from 0 (None: the last, in front of the norm before the head)."""

    layer: int | None = None


class Judge(Part):
    """j = sigmoid(w . h + b) for the state h of the judged token itself. It begins with no opinion."""

    key, Config = "judge-decoding", JudgeConfig

    def __init__(self, config: JudgeConfig, base: Base):
        super().__init__(config, base)
        backbone: Any = base.model.backbone
        if not getattr(backbone, "skippable", ()):
            raise ValueError(f"the states between the layers of {base} cannot be looked at, so nothing can judge them")
        depth = backbone.config.depth
        self.layer = depth - 1 if config.layer is None else config.layer
        if not 0 <= self.layer < depth:
            raise ValueError(
                f"the layers of {base} are 0 to {depth - 1}, and a judge of layer {self.layer} is asked for"
            )
        self.weight = nn.Parameter(torch.zeros(base.width, device=base.device))
        self.bias = nn.Parameter(torch.zeros((), device=base.device))

    @classmethod
    def made_by(cls) -> str:
        return "seriatim.posttraining.judge.train_judge"

    def forward(self, h: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest"]:
        """The logit of j."""
        wide = torch.promote_types(h.dtype, torch.float32)
        return h.to(wide) @ self.weight.to(wide) + self.bias.to(wide)


class Verdicts(NamedTuple):
    """A text as ids, and of each whether it is GOOD or WRONG, or UNASKED."""

    ids: list[int]
    labels: list[int]


def verdicts(tokenizer: Any, prompt: str, answer: str, wrong: tuple[int, int] | None = None) -> Verdicts:
    """A prompt, about which nothing is asked, and an answer, in which letters wrong[0] to wrong[1] are in error (None:
    it is right). A token is wrong if one of them is its own. Raises ValueError for a tokenizer that does not keep every
    letter."""
    before, ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    ends = tokenizer.bytes_of[torch.tensor(ids)].cumsum(0).tolist()
    if not ids or ends[-1] != len(answer.encode()):
        raise ValueError(
            f"{answer!r} is not what its tokens stand for: this tokenizer ({tokenizer.kind}) loses letters"
        )
    first, last = (len(answer[:at].encode()) for at in wrong or (len(answer), len(answer)))
    labels = []
    for start, end in zip([0, *ends], ends, strict=False):
        labels.append(GOOD if end <= first else WRONG if start < last else UNASKED)
    return Verdicts(before + ids, [UNASKED] * len(before) + labels)


@torch.no_grad()
def judged_states(
    base: Base, examples: Sequence[Verdicts], layer: int, batch: int = 32
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n"]]:
    """The states behind a layer of all tokens that are asked about, in float32, and their labels. Raises ValueError
    where there are none."""
    states, labels = [torch.zeros(0, base.width)], [torch.zeros(0, dtype=torch.long)]
    ordered = sorted(examples, key=lambda e: len(e.ids))
    for start in range(0, len(ordered), batch):
        some, look = ordered[start : start + batch], Look(layer)
        ids, label = (
            nn.utils.rnn.pad_sequence([torch.tensor(x) for x in rows], True, padding_value=fill)
            for rows, fill in (([e.ids for e in some], 0), ([e.labels for e in some], UNASKED))
        )
        base.system.states(ids.to(base.device), look)
        assert look.states is not None
        there = label != UNASKED
        states.append(look.states[:, -ids.shape[1] :][there].float().cpu())  # a learned start may stand in front
        labels.append(label[there])
    if not sum(map(len, labels)):
        raise ValueError("no token is said to be good or wrong: there is nothing to learn from")
    return torch.cat(states), torch.cat(labels)


def verdict_loss(logits: Float[Tensor, "n"], labels: Int[Tensor, "n"]) -> Tensor:
    """The mean binary cross-entropy in nats, in which good and wrong tokens weigh equally, however many there are."""
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return torch.stack([losses[labels == kind].mean() for kind in (GOOD, WRONG)]).mean()


DECAY = 1e-3  # of the squared weights of standardised states
ROUNDS = 200  # at most, of the solver


def train_judge(
    base: Base, examples: Sequence[Verdicts], config: JudgeConfig | None = None, decay: float = DECAY
) -> tuple[Judge, dict[str, float]]:
    """A judge, fitted to answers, and how it does on them (`figures`). Raises ValueError where good or wrong tokens are
    missing."""
    judge = Judge(config or JudgeConfig(), base)
    states, labels = judged_states(base, examples, judge.layer)
    if not 0 < int(labels.sum()) < len(labels):
        raise ValueError(f"of {len(labels):,} tokens {int(labels.sum()):,} are good: a judge learns from both kinds")
    mean, std = states.mean(0), states.std(0).clamp(min=1e-6)
    x = (states - mean) / std
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = verdict_loss(x @ weight + bias, labels) + decay * weight.square().sum()
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        solver.step(loss)
    with torch.no_grad():  # states as they are, in place of standardised ones
        judge.weight.copy_(weight / std)
        judge.bias.copy_(bias - mean @ (weight / std))
    judge.requires_grad_(False)
    return judge, figures(judge, states, labels)


@torch.no_grad()
def figures(
    judge: Judge, states: Float[Tensor, "n d"], labels: Int[Tensor, "n"], delta: float = 0.5
) -> dict[str, float]:
    """The loss, and the shares of good tokens that are accepted and of wrong ones that are not."""
    logits = judge(states.to(judge.weight.device)).cpu()
    accepted = torch.sigmoid(logits) > delta
    return {
        "loss": float(verdict_loss(logits, labels)),
        "good_accepted": float(accepted[labels == GOOD].float().mean()),
        "wrong_refused": float((~accepted[labels == WRONG]).float().mean()),
        "tokens": float(len(labels)),
    }
