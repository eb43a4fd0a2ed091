"""The released tokenizer of D-AR (Gao & Shou 2025; Hub showlab/D-AR, D-AR-tokenizer_v1.pt) in our parts.

Its code turns neighbouring dimensions of a head against each other, and gates the branches of encoder and reader by
learned vectors; weights are put into our order here, and gates multiplied into the matrices behind which they stand.
The projection onto features of another network, which only training needs, is left out. The generators of the release
(D-AR-L-360K.pt, D-AR-XL-360K.pt) have the names of LlamaGen's, and are told from these by those of their files; their
rotary positions count along the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from seriatim.tokenizers.sequential import SequentialConfig, SequentialTokenizer

HEAD = 64  # width of an attention head, at all sizes
TRAINING = ("quantize.codebook_used", "diff_decoder.net.repa_out.")  # is not needed to encode and decode
ENDS = {
    "patchify": "encoder.from_patch", "query_linear": "encoder.widen", "quant_in_conv": "encoder.to_code",
    "quant_out_conv": "from_code", "diff_decoder.net.cond_mlp": "decoder.told",
    "diff_decoder.net.conv_in": "decoder.from_patch", "diff_decoder.net.conv_out": "decoder.to_patch",
}  # fmt: skip
STACKS = {
    "encoder_layers": "encoder.net.layers", "decoder_layers": "reader.layers",
    "diff_decoder.net.blocks": "decoder.net.layers",
}  # fmt: skip

GUIDANCE = 0.2, 7.0  # at the first id and at the last: those of the released figures


def is_d_ar_tokenizer(weights: Mapping[str, Tensor]) -> bool:
    return {"patchify.weight", "quantize.embedding.weight", "query_embedding.weight"} <= weights.keys()


def read_d_ar(path: str | Path) -> SequentialTokenizer:
    """The tokenizer of a released file: its averaged weights where it has them. Raises ValueError where they are not
    those of D-AR."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    return d_ar_of(next((file[name] for name in ("ema", "model") if name in file), file))


def d_ar_of(weights: Mapping[str, Tensor], side: int = 256, queries: int = 256, groups: int = 8) -> SequentialTokenizer:
    """The tokenizer of released weights, in evaluation mode. side, queries, groups: what weights do not tell (as
    released). Raises ValueError where these are no weights of D-AR."""
    if "patchify.weight" not in weights or "quantize.embedding.weight" not in weights:
        raise ValueError(
            "these are no weights of D-AR's tokenizer: patchify.weight or quantize.embedding.weight is missing"
        )
    width, channels, patch, _ = weights["patchify.weight"].shape
    vocab, dim = weights["quantize.embedding.weight"].shape
    pixels = weights["diff_decoder.net.conv_in.weight"].shape[1]
    config = SequentialConfig(
        side=side, channels=channels, vocab=vocab, dim=dim, queries=queries, groups=groups, patch=patch, width=width,
        heads=width // HEAD, depth=_depth(weights, "encoder_layers"), read_depth=_depth(weights, "decoder_layers"),
        flow_depth=_depth(weights, "diff_decoder.net.blocks"), flow_patch=round((pixels / channels) ** 0.5),
        rank=weights["query_linear.weight"].shape[1],
    )  # fmt: skip
    tokenizer = SequentialTokenizer(config)
    named = _ours(weights, queries, width)
    wanted = {name: x.shape for name, x in tokenizer.state_dict().items() if name != "uses"}
    if {name: x.shape for name, x in named.items()} != wanted:
        wrong = sorted(set(named) ^ set(wanted)) or [n for n, s in wanted.items() if named[n].shape != s]
        raise ValueError(f"these are no weights of D-AR's tokenizer: {', '.join(wrong[:5])}")
    tokenizer.load_state_dict({**named, "uses": torch.zeros(vocab)})
    return tokenizer.eval().requires_grad_(False)


def _depth(weights: Mapping[str, Tensor], stack: str) -> int:
    return sum(name.startswith(stack + ".") and name.endswith("attention.q.weight") for name in weights)


def _ours(weights: Mapping[str, Tensor], queries: int, width: int) -> dict[str, Tensor]:
    """Released weights by our names. Unknown ones keep their names, and are refused."""
    out = {
        "encoder.queries": weights["query_embedding.weight"][:queries],
        "place": weights["decoder_embedding.weight"][:queries],
        "quantizer.table": weights["quantize.embedding.weight"],
    }  # fmt: skip
    for stack in ("encoder.net", "reader"):  # norms without weights, there
        out |= {f"{stack}.norm": torch.ones(width), f"{stack}.norm_bias": torch.zeros(width)}
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, x in weights.items():
        if name.startswith(TRAINING) or name in ("query_embedding.weight", "decoder_embedding.weight"):
            continue
        part, _, kind = name.rpartition(".")
        within = [stack for stack in STACKS if name.startswith(stack + ".")]
        if within:
            number, _, rest = name.removeprefix(within[0] + ".").partition(".")
            layers.setdefault((within[0], number), {})[rest] = x
        elif part in ENDS:
            out[f"{ENDS[part]}.{kind}"] = x.flatten(1) if kind == "weight" else x
        elif name != "quantize.embedding.weight":
            out[name] = x
    for (stack, number), layer in layers.items():
        out |= {f"{STACKS[stack]}.{number}.{k}": v for k, v in _layer(layer).items()}
        if stack == "diff_decoder.net.blocks":
            out |= {f"decoder.net.steers.{number}.{k}": v for k, v in _steer(layer).items()}
    return out


def _layer(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one layer: its gates multiplied in, queries and keys in our order."""
    one = torch.ones(len(w["attention.proj.bias"]))
    gates = w.get("gate1", one), w.get("gate2", one)
    out = {}
    for kind, ours in (("weight", ""), ("bias", "_bias")):
        q, k, v = (w[f"attention.{x}.{kind}"] for x in "qkv")
        out["qkv" + ours] = torch.cat([_turned(q), _turned(k), v])
        out |= {f"{x}_norm{ours}": _turned(w[f"attention.{x}_norm.{kind}"]) for x in "qk"}
        out["up" + ours] = w[f"mlp.fc1.{kind}"]
        for name, of, gate in (("out", "attention.proj", gates[0]), ("down", "mlp.fc2", gates[1])):
            out[name + ours] = w[f"{of}.{kind}"] * (gate[:, None] if kind == "weight" else gate)
        for name in ("norm1", "norm2"):
            if f"{name}.{kind}" in w:
                out[name + ours] = w[f"{name}.{kind}"]
        if "adaLN_modulation.1.weight" in w:
            out["ada" + ours] = w[f"adaLN_modulation.1.{kind}"]
    return out


def _steer(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What steers the slots of one layer."""
    out: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for part, ours in (("time_embed.mlp", "time"), ("cond_embed", "memory")):
            out |= {f"{ours}.{i}.{kind}": w[f"{part}.{i}.{kind}"] for i in (0, 2)}
        out[f"q.{kind}"] = _turned(w[f"cross_attn.q.{kind}"])
        out[f"kv.{kind}"] = torch.cat([_turned(w[f"cross_attn.k.{kind}"]), w[f"cross_attn.v.{kind}"]])
        out[f"out.{kind}"] = w[f"cross_attn.proj.{kind}"]
        out |= {f"{x}_norm.{kind}": _turned(w[f"cross_attn.{x}_norm.{kind}"]) for x in "qk"}
    return out


def _turned(x: Tensor) -> Tensor:
    """Queries or keys in the order in which our rotary embedding pairs dimensions: the first half of a head against
    the second, rows before columns in each; there neighbours are pairs."""
    order = torch.arange(HEAD).view(2, HEAD // 4, 2).permute(2, 0, 1).flatten()  # axis, frequency, member
    return x.unflatten(0, (-1, HEAD))[:, order].flatten(0, 1)
