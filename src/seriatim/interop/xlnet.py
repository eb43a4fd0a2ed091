"""XLNet as it is published (model_type "xlnet"): XLNet itself, and the any-subset models trained from it
(therealgabeguo/ASARM on the hub). Its weights fill a model of `AnySubset`: no memory of earlier segments, and no kinds
of segments, which any-subset models do without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.backbones.xlnet import XLNet, XLNetConfig
from seriatim.embed import TokenEmbed
from seriatim.factorization.subset import AnySubset
from seriatim.heads.categorical import CategoricalHead
from seriatim.interop.fields import Fields
from seriatim.interop.weights import NAMED, opened
from seriatim.layout import line
from seriatim.model import Model

LENGTH = 512  # tokens that the published ones were trained on; distances have no end
ASIDE = (  # memory and segments, heads for questions, training
    "mem_len", "reuse_len", "use_mems_eval", "use_mems_train", "dropout", "start_n_top", "end_n_top",
    "summary_last_dropout", "d_head", "untie_r",
)  # fmt: skip
UNUSED = ("r_s_bias", "seg_embed", "lm_loss.weight")  # kinds of segments; a copy of the table


def read(raw: Mapping[str, Any], where: str = "config.json") -> tuple[XLNetConfig, int]:
    """Sizes and vocabulary of a config.json. Raises ValueError for what is not understood."""
    f = Fields(raw, where)
    for name in ASIDE:
        f.take(name)
    f.must("attn_type", "bi")
    f.must("bi_data", False)
    f.must("same_length", False)
    f.must("clamp_len", -1)
    f.must("ff_activation", "gelu")
    f.must("tie_word_embeddings", True)
    width, heads = f.number("d_model", default=1024), f.number("n_head", default=16, most=100_000)
    depth, hidden = f.number("n_layer", default=24, most=10_000), f.number("d_inner", default=4096)
    vocab = f.number("vocab_size", default=32_000)
    eps = f.real("layer_norm_eps", default=1e-12)
    f.finish()
    return XLNetConfig(width, depth, heads, hidden, eps), vocab


def build(config: XLNetConfig, vocab: int, length: int = LENGTH) -> Model:
    """The model with fresh weights."""
    embed = TokenEmbed(vocab, config.width, mask=True, start=False)
    head = CategoricalHead(config.width, vocab, tied=embed.table, bias=True)
    return Model(line(length), AnySubset(), embed, XLNet(config), head)


def published(folder: Path, raw: Mapping[str, Any], dtype: torch.dtype | None = None) -> Model:
    """The model of a folder of safetensors and its config, in `dtype` (None: as stored). Raises FileNotFoundError, and
    ValueError that names tensors that are missing, unexpected or misshapen."""
    config, vocab = read(raw, str(folder / "config.json"))
    with torch.device("meta"):
        model = build(config, vocab)
    with opened(folder) as files:
        wanted = _names(config)
        missing = sorted(name for name in wanted.values() if name not in files)
        odd = sorted(name for name in files if name not in wanted.values() and not name.endswith(UNUSED))
        for names, said in ((missing, "lacks"), (odd, "holds tensors that its config does not explain:")):
            if names:
                raise ValueError(f"{folder} {said} {', '.join(names[:NAMED])}")
        state = {}
        for ours, parameter in model.state_dict().items():
            name = wanted["embed.table" if ours == "heads.token.weight" else ours]
            if name is not None:
                state[ours] = _shaped(name, files[name].get_tensor(name), parameter.shape, folder).to(dtype)
    model.load_state_dict(state, assign=True)
    model.heads["token"].weight = model.embed.table  # type: ignore[assignment]
    return model


def _names(config: XLNetConfig) -> dict[str, str]:
    """Our parameters -> the published tensors."""
    names = {
        "embed.table": "transformer.word_embedding.weight", "embed.mask": "transformer.mask_emb",
        "heads.token.bias": "lm_loss.bias",
    }  # fmt: skip
    attention = {
        "q": "q", "k": "k", "v": "v", "r": "r", "out": "o", "content_bias": "r_w_bias", "place_bias": "r_r_bias",
        "norm1.weight": "layer_norm.weight", "norm1.bias": "layer_norm.bias",
    }  # fmt: skip
    forward = {"norm2": "layer_norm", "up": "layer_1", "down": "layer_2"}
    for i in range(config.depth):
        ours, theirs = f"backbone.layers.{i}.", f"transformer.layer.{i}."
        names |= {ours + a: f"{theirs}rel_attn.{b}" for a, b in attention.items()}
        names |= {f"{ours}{a}.{x}": f"{theirs}ff.{b}.{x}" for a, b in forward.items() for x in ("weight", "bias")}
    return names


def _shaped(name: str, x: Tensor, shape: torch.Size, folder: Path) -> Tensor:
    """A published tensor as ours has it: matrices of attention are stored (width, heads, dim), and applied the other
    way round, but for that of outputs."""
    end = name.rsplit(".", 1)[-1]
    if end in ("q", "k", "v", "r", "o") and x.dim() == 3:
        x = x.flatten(1)
        x = x if end == "o" else x.T.contiguous()
    x = x.flatten() if end == "mask_emb" else x
    if x.shape != shape:
        raise ValueError(f"{folder}: {name} has the shape {tuple(x.shape)}, and {tuple(shape)} is expected")
    return x
