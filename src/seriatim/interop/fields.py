"""A published model's config.json, read key by key: what is not understood and could matter is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seriatim.backbones.rope import RoPE, Stretch

MOST_NUMBERS = 2_000_000_000_000  # parameters; a config that asks for more is a mistake or an attack
# how a model was trained, saved or named: nothing that changes what it computes
HARMLESS = frozenset({
    "_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "initializer_range", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout",
    "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "embd_dropout", "classifier_dropout",
    "output_attentions", "output_hidden_states", "return_dict", "is_decoder", "task_specific_params", "id2label",
    "label2id", "auto_map", "router_aux_loss_coef", "output_router_logits", "chunk_size_feed_forward",
    "cache_implementation", "unk_token_id", "summary_type", "summary_use_proj", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "n_ctx", "problem_type", "gradient_checkpointing",
    "_attn_implementation_autoset", "attn_implementation", "is_llama_config", "_sliding_window_pattern",
    "max_window_layers", "finetuning_task", "tokenizer_class", "prefix", "use_flash_attention_2", "classifier_bias",
    "embedding_dropout", "attention_probs_dropout_prob", "unsloth_version", "unsloth_fixed", "transformers.js_config",
})  # fmt: skip


class Fields:
    """Keys are taken one by one; `finish` refuses what nobody took."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json"):
        self.raw, self.where, self.left = dict(raw), where, set(raw) - HARMLESS

    def presume(self, **values: Any) -> None:
        """What a family's files mean where they leave a key out; where one is null, it stays null."""
        self.raw = values | self.raw

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these names that there is and that is not null."""
        self.left -= set(names)
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        return default

    def number(self, *names: str, default: int | None = None, least: int = 1, most: int = 10_000_000) -> int:
        """A whole number in a sensible range. Raises ValueError else."""
        value = self.take(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{self.where}: {names[0]} is a whole number from {least} to {most}, got {value!r}")
        return value

    def real(self, *names: str, default: float | None = None) -> Any:
        """A positive number, or None where neither the file nor `default` says one. Raises ValueError else."""
        value = self.take(*names, default=default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{self.where}: {names[0]} is a positive number, got {value!r}")
        return float(value)

    def choice(self, *names: str, of: Mapping[str, Any], default: str) -> Any:
        """One of several words, translated. Raises ValueError for others."""
        value = self.take(*names, default=default)
        if value not in of:
            name = next((n for n in names if self.raw.get(n) is not None), names[0])
            raise ValueError(f"{self.where}: {name} is {value!r}; understood are {', '.join(map(str, of))}")
        return of[value]

    def limits(self, name: str) -> tuple[float, float] | None:
        """A lower and an upper limit; None where they bound nothing that is positive. Raises ValueError for others."""
        said = self.take(name)
        if said is None:
            return None
        pair = isinstance(said, list | tuple) and len(said) == 2
        if not pair or not all(isinstance(x, int | float) for x in said) or not 0 <= said[0] < said[1]:
            raise ValueError(f"{self.where}: {name} is two numbers, the lower one first, got {said!r}")
        return None if tuple(said) == (0, math.inf) else (float(said[0]), float(said[1]))

    def must(self, name: str, expected: Any, default: Any = None) -> None:
        """Refuse a key that says something else than what is computed here."""
        value = self.take(name, default=default)
        if value is not None and value != expected:
            raise ValueError(f"{self.where}: {name} is {value!r}; only {expected!r} is understood")

    def finish(self) -> None:
        """Raises ValueError that names keys nobody took, unless they say nothing (null, false, empty)."""
        odd = sorted(k for k in self.left if self.raw[k] not in (None, False, {}, []) and not k.startswith("_"))
        if odd:
            said = ", ".join(f"{k} = {str(self.raw[k])[:60]}" for k in odd)
            raise ValueError(f"{self.where} has keys that are not understood and may change what is computed: {said}")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises FileNotFoundError, ValueError for what is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds neither a run (run.json) nor a published model (config.json)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); it may have been cut short") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ValueError(f"{path} does not say what model it is of (model_type)")
    if raw.get("quantization_config"):
        raise ValueError(f"{path}: quantised weights are not read; use the model's own, unquantised files")
    return raw


def _number(said: dict[str, Any]) -> Any:
    """Infinity as transformers 5 writes it; earlier files hold the bare word, which JSON in Python reads."""
    return float(said["__float__"]) if set(said) == {"__float__"} else said


def rope_of(f: Fields, theta: float = 10_000.0, dims: int | None = None) -> RoPE:
    """Rotary embedding by either dialect: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    return rope_from(
        f, f.take("rope_parameters", "rope_scaling", default={}), f.take("rope_theta", default=theta), dims
    )


def rope_from(f: Fields, said: Mapping[str, Any], theta: float, dims: int | None = None) -> RoPE:
    """One set of rotary parameters. Raises ValueError for a kind or a key that is not understood."""
    said = {k: v for k, v in said.items() if v is not None}
    theta = said.pop("rope_theta", theta)
    kind = said.pop("rope_type", said.pop("type", "default"))
    said.pop("type", None)
    said.pop("partial_rotary_factor", None)  # taken with the head's dimension
    longest = f.number("max_position_embeddings", default=2048)
    f.take("original_max_position_embeddings")
    if kind in ("default", None):
        stretch = None
    elif kind in ("linear", "dynamic", "yarn", "llama3", "longrope", "su"):
        stretch = _stretch("longrope" if kind == "su" else kind, said, longest, f)
    else:
        raise ValueError(f"{f.where}: rotary embedding of type {kind!r} is not understood")
    said.pop("finetuned", None)
    if said:
        raise ValueError(f"{f.where}: rotary parameters {', '.join(sorted(said))} are not understood")
    return RoPE(float(theta), dims=dims, stretch=stretch)


def _stretch(kind: Any, said: dict[str, Any], longest: int, f: Fields) -> Stretch:
    first = f.take("original_max_position_embeddings", default=None)
    first = said.pop("original_max_position_embeddings", first)
    if kind == "longrope":
        first = first or longest
        factor = said.pop("factor", longest / first)
        near, far = (tuple(map(float, said.pop(name))) for name in ("short_factor", "long_factor"))
        scale = said.pop("attention_factor", None)
        return Stretch("longrope", float(factor), first, attention=scale, near=near, far=far)
    factor = float(said.pop("factor"))
    if kind == "llama3":
        return Stretch(kind, factor, first, float(said.pop("high_freq_factor")), float(said.pop("low_freq_factor")))
    if kind == "yarn":
        fast, slow = float(said.pop("beta_fast", None) or 32), float(said.pop("beta_slow", None) or 1)
        truncate = bool(said.pop("truncate", True))
        scale = said.pop("attention_factor", None)
        return Stretch(kind, factor, first or longest, fast, slow, scale, truncate)
    return Stretch(kind, factor, longest if kind == "dynamic" else 0)
