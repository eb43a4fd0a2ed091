"""The released weights of LlamaGen (Sun et al. 2024; Hub FoundationVision/LlamaGen: class-conditional, B to 3B) and of
its tokenizers, by our names.

Facts of the code: neighbouring dimensions of a head are turned against each other, the first half of them by the row,
the second by the column of the token that a slot carries; the class is not turned but multiplied by zero, so that all
give it a score of 0 and it sees itself alone; feed-forward gate and value are matrices of their own. Of the tokenizer,
latents and codes have unit length; resolutions of the decoder are listed from the coarsest on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.interop.vqgan import body_of
from seriatim.tokenizers.vq import VQConfig

OUTSIDE = {
    "cls_embedding.embedding_table.weight": "conditions.class.table", "tok_embeddings.weight": "embed.table",
    "norm.weight": "backbone.norm", "output.weight": "heads.token.weight",
}  # fmt: skip
LAYER = {
    "attention.wo.weight": "out", "feed_forward.w2.weight": "down", "attention_norm.weight": "norm1",
    "ffn_norm.weight": "norm2",
}  # fmt: skip
HEADS = {3200: 32, 4096: 32}  # by width; all others are 64 wide
GUIDANCE = {768: 2.0, 1024: 2.0, 3200: 1.65}  # by width; others 1.75: those of the published figures
MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}
USED = "quantize.codebook_used"  # a count of training


def is_llamagen(weights: Mapping[str, Tensor]) -> bool:
    return {"tok_embeddings.weight", "layers.0.attention.wqkv.weight"} <= weights.keys() and any(
        name.startswith("cls_embedding.") for name in weights
    )


def is_llamagen_tokenizer(weights: Mapping[str, Tensor]) -> bool:
    return "encoder.conv_blocks.0.res.0.conv1.weight" in weights and "quantize.embedding.weight" in weights


def vq_of(weights: Mapping[str, Tensor], grid: int) -> tuple[VQConfig, dict[str, Tensor]]:
    """Config and weights of a released tokenizer of pictures that become so many ids a side."""
    vocab, dim = weights["quantize.embedding.weight"].shape
    halvings = sum(name.endswith(".downsample.conv.weight") for name in weights)
    first = weights["encoder.conv_in.weight"]
    config = VQConfig(
        side=grid * 2**halvings, channels=first.shape[1], width=len(first), vocab=vocab, dim=dim, quantizer="vq-l2",
        body="residual", halvings=halvings, inner=weights["quant_conv.weight"].shape[1],
    )  # fmt: skip
    named = {_published(name, halvings): x for name, x in weights.items() if name != USED}
    return config, body_of(named) | {"quantizer.table": weights["quantize.embedding.weight"]}


def _published(name: str, halvings: int) -> str:
    """A name as VQGAN has it."""
    side, _, rest = name.partition(".")
    words = rest.split(".")
    if words[0] == "mid":
        words[1] = MIDDLE[words[1]]
    elif words[0] == "conv_blocks":
        level = int(words[1]) if side == "encoder" else halvings - int(words[1])
        words[:2] = ["down" if side == "encoder" else "up", str(level)]
        words[2] = words[2].replace("res", "block")
    return ".".join([side, *words])


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """vocab, width, depth, heads, hidden and classes of a released generator. Raises ValueError for one that is told
    texts."""
    if "cls_embedding.embedding_table.weight" not in weights:
        raise ValueError("this generator draws what texts say; those that draw classes are read (c2i_*.pt)")
    vocab, width = weights["tok_embeddings.weight"].shape
    return {
        "vocab": vocab, "width": width, "depth": sum(name.endswith(".attention.wqkv.weight") for name in weights),
        "heads": HEADS.get(width, width // 64), "hidden": len(weights["layers.0.feed_forward.w1.weight"]),
        "classes": len(weights["cls_embedding.embedding_table.weight"]) - 1,
    }  # fmt: skip


def named_llamagen(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    sizes, out = sizes_of(weights), {}
    for name, x in weights.items():
        _, number, *rest = name.split(".", 2)
        part, layer = "".join(rest), f"backbone.layers.{number}"
        if name in OUTSIDE:
            out[OUTSIDE[name]] = x
        elif part in LAYER:
            out[f"{layer}.{LAYER[part]}"] = x
        elif part == "attention.wqkv.weight":
            q, k, v = x.split([sizes["width"], *[(len(x) - sizes["width"]) // 2] * 2])
            dim = sizes["width"] // sizes["heads"]
            out[f"{layer}.qkv"] = torch.cat([_halved(q, dim), _halved(k, dim), v])
        elif part == "feed_forward.w1.weight":
            out[f"{layer}.up"] = torch.cat([x, weights[name.replace("w1", "w3")]])
        elif part != "feed_forward.w3.weight":
            out[name] = x
    return out


def _halved(rows: Float[Tensor, "o i"], dim: int) -> Float[Tensor, "o i"]:
    """Dimensions of heads that stand as neighbours, in two halves."""
    return rows.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2)
