"""Language models of this library in EleutherAI's evaluation harness (extra `lm-eval`), beside its own backends.

    python -m seriatim.verbs.harness run --model seriatim --model_args pretrained=./model --tasks hellaswag

The arguments are the harness's own. `--model_args` takes `pretrained` (whatever `seriatim.load` takes), `batch_size`,
`dtype`, `weights`, `adapter`, `decoder`, `compile`, `max_length` and, of a model that decides tokens in any order,
`draws`: by how many (128) its bound on the likelihood is taken, the counts of hidden tokens spread evenly; `steps` and
`guidance` by which it writes. `suppress_tokens`, `begin_suppress_tokens` and `keep_tokens` are ids or tokens between
semicolons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seriatim.decoding.loop import generate
from seriatim.systems.decoders import decoder_of
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.masked_text import MaskedText
from seriatim.systems.system import Sampling
from seriatim.systems.tokens import token_ids
from seriatim.verbs.load import load

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise ImportError("the evaluation harness is not installed: pip install 'seriatim[lm-eval]'") from None

NEW = 256  # tokens to generate, where a task does not say


@register_model("seriatim")
class Harness(TemplateLM):
    """One language model as the harness asks it: log-likelihoods of continuations and of whole texts, and texts."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        dtype: str | None = None,
        weights: str | None = None,
        adapter: str | None = None,
        decoder: str = "ancestral",
        compile: bool = False,
        max_length: int | None = None,
        draws: int | str = 128,
        steps: int | str | None = None,
        guidance: float | str = 0.0,
        suppress_tokens: int | str = "",
        begin_suppress_tokens: int | str = "",
        keep_tokens: int | str = "",
        **rest: Any,  # what the harness passes to every model: device, max_batch_size
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is a whole number of at least 1, got {batch_size!r}")
        model = load(pretrained, None if dtype == "auto" else dtype, adapter, weights)
        if not isinstance(model, LanguageModel | MaskedText) or model.tokenizer is None:
            raise ValueError(f"{pretrained} is no language model with a tokenizer: the harness asks about texts")
        if isinstance(model, MaskedText):
            decoder = "own" if decoder == "ancestral" else decoder
        elif compile:
            model.model.compile_decoding()
        self.model, self.tokenizer, self.batch_size, self.decoder = model, model.tokenizer, int(batch_size), decoder
        self.draws = int(draws)
        if self.draws < 1:
            raise ValueError(f"a bound is taken by at least 1 draw, got {draws!r}")
        barred = {"suppress_tokens": suppress_tokens, "begin_suppress_tokens": begin_suppress_tokens}
        self.barred: dict[str, Any] = {name: token_ids(self.tokenizer, _tokens(text)) for name, text in barred.items()}
        kept = token_ids(self.tokenizer, _tokens(keep_tokens))
        self.asked: dict[str, Any] = {"guidance": float(guidance), "keep_tokens": kept}
        if steps is not None:
            self.asked["steps"] = int(steps)
        if not isinstance(model, MaskedText) and (steps is not None or kept or float(guidance)):
            raise ValueError(f"{pretrained} writes each token from those before: it takes no steps and no guidance")
        self.max_length = min(max_length or model.model.layout.size, model.model.layout.size)

    @property
    def eot_token_id(self) -> int:
        if not self.model.stop:
            raise ValueError("this model has no end of text, which the harness asks for")
        return self.model.stop[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which nothing is given."""
        settings = getattr(self.model, "settings", {}) | getattr(self.model, "raw", {})
        bos = settings.get("bos_token_id", getattr(self.tokenizer, "special", {}).get("bos"))
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **rest: Any) -> list[int]:
        bare = getattr(self.tokenizer, "encode_templated", self.tokenizer.encode)
        return bare(string) if add_special_tokens is False else self.tokenizer.encode(string)

    # ---- scoring ----------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **rest: Any
    ) -> list[tuple[float, bool]]:
        """Nats of each continuation behind its context, and whether it is what greedy decoding would write."""
        if isinstance(self.model, MaskedText):
            return [self._bound(self.model, context, ids) for _, context, ids in requests]
        out: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            rows = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in some]
            said = torch.log_softmax(self._logits([row[:-1] for row in rows]).float(), -1)
            for b, i in enumerate(some):
                count, end = len(requests[i][2]), len(rows[b]) - 1
                ids, law = torch.tensor(rows[b][-count:]), said[b, end - count : end]
                total = float(law.gather(1, ids[:, None]).sum())
                out[i] = total, bool((law.argmax(-1) == ids).all())
        return out

    def _bound(self, model: MaskedText, context: list[int], ids: list[int]) -> tuple[float, bool]:
        """The same of a model that decides tokens in any order: a bound by `draws` draws, and what it would write one
        token at a time, the surest first."""
        row = (context + ids)[-self.max_length :]
        given = len(row) - len(ids)
        if given < 0:
            raise ValueError(f"a text of {len(ids)} tokens is to be scored, and this model takes {self.max_length}")
        greedy = Sampling(temperature=0.0, steps=len(ids))
        canvas = model.begun(row[:given], len(ids))
        generate(model.target(None, greedy), canvas, model.decider(greedy))
        written = canvas.value["token"][0, given:].tolist()
        return -model.bound(row, given, self.draws), written == ids

    def _logits(self, rows: Sequence[list[int]]) -> Tensor:
        assert isinstance(self.model, LanguageModel)
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        return self.model.logits(ids)  # padding stands behind, where no token that counts sees it

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, window by window."""
        windows, whose = [], []
        for n, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for pair in map(make_disjoint_window, pairs):
                windows.append((None, *pair))
                whose.append(n)
        totals = [0.0] * len(requests)
        for n, (nats, _) in zip(whose, self._loglikelihood_tokens(windows), strict=True):
            totals[n] += nats
        return totals

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string or the end of text."""
        out = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for members in groups.values():
            settings = normalize_gen_kwargs(requests[members[0]].args[1], NEW)
            for start in range(0, len(members), self.batch_size):
                some = members[start : start + self.batch_size]
                for i, text in zip(some, self._texts([requests[i].args[0] for i in some], settings), strict=True):
                    out[i] = text
        return out

    def _texts(self, contexts: Sequence[str], settings: Any) -> list[str]:
        until, new = settings.get("until") or [], settings["max_gen_toks"]
        stops = [until] if isinstance(until, str) else [s for s in until if s]
        room = self.max_length - new
        if room < 1:
            raise ValueError(
                f"a task asks for {new} new tokens, and this model takes {self.max_length} with the prompt: pass fewer "
                f"(--gen_kwargs max_gen_toks={max(self.max_length // 2, 1)})"
            )
        rows = [self.tok_encode(context)[-room:] for context in contexts]
        if isinstance(self.model, MaskedText):
            return [self._unmasked(self.model, row, new, settings, stops) for row in rows]
        made = self.model.generate(
            rows, self.decoder, max_new_tokens=new, temperature=settings.get("temperature", 0.0) or 0.0,
            top_k=settings.get("top_k"), top_p=settings.get("top_p"), stop=[*self.model.stop, *stops], **self.barred,
        )  # fmt: skip
        return [g.text or "" for g in made]  # type: ignore[union-attr]

    def _unmasked(self, model: MaskedText, row: list[int], new: int, settings: Any, stops: Sequence[str]) -> str:
        """A text up to its end, or the first of the stop strings."""
        asked: dict[str, Any] = {k: settings[k] for k in ("top_k", "top_p") if settings.get(k) is not None}
        asked |= self.asked | self.barred
        sampling = replace(model.sampling, temperature=settings.get("temperature", 0.0) or 0.0, **asked)
        way = decoder_of(model, self.decoder, sampling)
        text = "".join(model.stream(row, new, sampling, decoding=way))
        return text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))]


def _tokens(text: int | str) -> list[int | str]:
    """Tokens between semicolons: whole numbers are ids."""
    return [int(word) if word.isdigit() else word for word in str(text).strip("[]").split(";") if word]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
