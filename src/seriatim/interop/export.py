"""Our language models in Hugging Face's format: config.json, safetensors, tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from seriatim.backbones.transformer import Transformer
from seriatim.interop.blueprint import Part, how_of
from seriatim.interop.chat import ChatTemplate
from seriatim.interop.families.llama import NORMS, parts_of
from seriatim.model import Model

LARGEST = 5 * 2**30  # bytes of a file of weights


class Publication(NamedTuple):
    """A model in Hugging Face's terms: config.json, tensors by name, generation_config.json."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def published_tensors(ours: Mapping[str, Tensor], parts: tuple[Part, ...], config: Any) -> dict[str, Tensor]:
    """Tensors by our names, as in a model's state -> every one under its published name, as the family stores it.
    Raises ValueError where some are kept in another form."""
    out: dict[str, Tensor] = {}
    gone = [part.ours for part in parts if part.ours not in ours]
    if gone:
        raise ValueError(f"the weights are quantised ({gone[0]}): give the unquantised model")
    for part in parts:
        x = ours[part.ours].detach()
        if part.row is not None:  # of what another part is
            (name,) = part.theirs
            out[name] = out[name].index_copy(0, torch.tensor([part.row], device=x.device), x[None])
            continue
        apart = how_of(part).apart(x, part.theirs, config)
        out |= {theirs: x.contiguous() for theirs, x in zip(part.theirs, apart, strict=True)}
    return out


def llama_parts(model: Model) -> tuple[Part, ...]:
    """The parameters of a plain decoder as a Llama has them. Raises ValueError for what no Llama has."""
    backbone = model.backbone
    c: Any = getattr(backbone, "config", None)
    plain = isinstance(backbone, Transformer) and (c.norm, c.place, c.activation) == ("rms", "pre", "swiglu")
    odd = not plain or c.parallel or c.qk_norm or c.experts or c.softcap or c.vector or c.memory or len(c.kinds) > 1
    if odd or c.rope is None or c.rope.stretch is not None or c.rope.dims is not None:
        raise ValueError("only plain decoders (RMS norm, rotary positions, SwiGLU) are Llamas; this model is another")
    return parts_of(c, False, NORMS, False, False)


def llama_of(model: Model, length: int, start: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a plain decoder as a Llama. A learned start becomes the embedding of id `start`, which then
    begins every text; the output matrix stays as it is. Raises ValueError for what no Llama has."""
    embed, head = model.embed, model.heads["token"]
    c: Any = model.backbone.config
    tensors = published_tensors(model.state_dict(), llama_parts(model), c)
    first: Any = getattr(embed, "start", None)
    if first is not None:
        table = tensors["model.embed_tokens.weight"].clone()
        table[start] = first.detach()
        tensors["model.embed_tokens.weight"] = table
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.width,
        "num_hidden_layers": c.depth, "num_attention_heads": c.heads, "num_key_value_heads": c.groups,
        "head_dim": c.dim, "intermediate_size": c.inner, "hidden_act": "silu", "rms_norm_eps": c.eps,
        "max_position_embeddings": length + (first is not None), "vocab_size": head.vocab,  # type: ignore[union-attr]
        "rope_theta": c.rope.theta, "attention_bias": c.biased("qkv"), "mlp_bias": c.biased("up"),
        "tie_word_embeddings": False, "bos_token_id": start if first is not None else None,
    }  # fmt: skip
    return config, tensors


def write_published(out: Path, what: Publication, tokenizer: Any = None, chat: ChatTemplate | None = None) -> None:
    """A folder as the hub has them; complete or not there. Raises ValueError for a folder that holds something, OSError
    where nothing can be written."""
    config, tensors, settings = what
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another folder")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    describe(part, config, settings, next(x.dtype for x in tensors.values() if x.dim() > 1), tokenizer, chat)
    groups: list[dict[str, Tensor]] = [{}]
    for name, x in tensors.items():
        held = sum(t.numel() * t.element_size() for t in groups[-1].values())
        if groups[-1] and held + x.numel() * x.element_size() > LARGEST:
            groups.append({})
        groups[-1][name] = x
    files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    files = ["model.safetensors"] if len(groups) == 1 else files
    for file, group in zip(files, groups, strict=True):
        save_file(group, str(part / file), {"format": "pt"})
    if len(groups) > 1:
        where = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        _save(part, {"metadata": {"total_size": size}, "weight_map": where}, "model.safetensors.index.json")
    if out.exists():
        out.rmdir()
    os.replace(part, out)


def describe(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], dtype: torch.dtype, tokenizer: Any = None,
    chat: ChatTemplate | None = None,
) -> None:  # fmt: skip
    """Everything of a published folder but its weights, of `dtype`."""
    form = str(dtype).removeprefix("torch.")
    _save(folder, {**config, "dtype": form, "torch_dtype": form}, "config.json")
    _save(folder, {k: v for k, v in settings.items() if v is not None}, "generation_config.json")
    if tokenizer is not None and hasattr(tokenizer, "inner"):
        tokenizer.inner.save(str(folder / "tokenizer.json"))
        said = {} if chat is None else chat.tokens
        _save(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **said}, "tokenizer_config.json")
    if chat is not None:
        (folder / "chat_template.jinja").write_text(chat.source, encoding="utf-8")


def _save(folder: Path, about: Mapping[str, Any], name: str) -> None:
    (folder / name).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
