"""The released binary autoencoders and generators of ELM (Liu et al. 2024; Hub xuantonglll/ELM,
bae/bae_*/binaryae_ema.th, gpt/{L,XL,XXL,2B}-*.pth) in our parts.

Facts of the code: pixels go from 0 to 1; no activation stands behind the last norms; the decoder has no more blocks
than the encoder, begins with a norm where it was trained so (the commands of all released generators say so), and reads
the sum of the embeddings of set bits, so our table is the identity and the embeddings are the convolution behind it;
the first bit is the most significant; shortcuts of blocks that change no width are stored, but never used. Their
encoders draw bits where they were trained so (all but "deter"); ours takes the likelier ones. The generator is
LlamaGen's, but each sub-code of a place has a table of its own, and one matrix maps them side by side into the model:
tables and matrix are multiplied out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from seriatim.interop import llamagen
from seriatim.tokenizers.vq import VQConfig, VQTokenizer

UNUSED = "generator.logsigma."  # for a likelihood that was measured after training
SIDE = 16  # ids in a row of all released models
GUIDANCE, TOP_K = 3.0, 1000  # of the released command for figures
SIDES = {"encoder": "encoder", "generator": "decoder"}


def read_bae(path: str | Path, side: int | None = None) -> VQTokenizer:
    """The tokenizer of a released file. Raises ValueError where its weights are not those of ELM's autoencoder."""
    return bae_of(torch.load(path, map_location="cpu", weights_only=True), side)


def bae_of(weights: Mapping[str, Tensor], side: int | None = None) -> VQTokenizer:
    """The tokenizer of released weights, in evaluation mode. side: pixels, which weights do not tell (None: those that
    become 16 ids a side, 256 as released). Raises ValueError where these are no weights of ELM's autoencoder."""
    own = {name.removeprefix("ae."): x for name, x in weights.items() if name.startswith("ae.")} or dict(weights)
    first = {f"{name}.blocks.0.weight" for name in SIDES}
    if not first | {"quantize.proj.0.weight", "quantize.embed.weight"} <= own.keys():
        raise ValueError("these are no weights of ELM's autoencoder: quantize.proj.0.weight or others are missing")
    bits, inner = own["quantize.embed.weight"].shape
    width, channels = own["encoder.blocks.0.weight"].shape[:2]
    halvings = sum(name.startswith("encoder.") and name.endswith(".conv.weight") for name in own)
    config = VQConfig(
        side=side or SIDE * 2**halvings, channels=channels, vocab=2**bits, quantizer="bernoulli", width=width,
        halvings=halvings, inner=inner, body="elm-normed" if own["generator.blocks.0.weight"].dim() == 1 else "elm",
    )  # fmt: skip
    tokenizer = VQTokenizer(config)
    named = _ours(own, tokenizer)
    wanted = {n: x.shape for n, x in tokenizer.state_dict().items() if not n.startswith("picture_loss")}
    if {n: x.shape for n, x in named.items()} != wanted:
        wrong = sorted(set(named) ^ set(wanted)) or [n for n, shape in wanted.items() if named[n].shape != shape]
        raise ValueError(f"these are no weights of ELM's autoencoder: {', '.join(wrong[:5])}")
    tokenizer.load_state_dict(named, strict=False)
    return tokenizer.eval().requires_grad_(False)


def _ours(weights: Mapping[str, Tensor], tokenizer: VQTokenizer) -> dict[str, Tensor]:
    """Released weights by our names. Unknown ones keep their names, and are refused."""
    embed = weights["quantize.embed.weight"]
    out = {
        "quantizer.table": torch.eye(len(embed)),
        "encoder.to_code.weight": weights["quantize.proj.0.weight"],
        "encoder.to_code.bias": weights["quantize.proj.0.bias"],
        "decoder.from_code.weight": embed.T[..., None, None].contiguous(),
        "decoder.from_code.bias": torch.zeros(embed.shape[1]),
    }
    stacks = {theirs: _with_weights(getattr(tokenizer, ours).layers) for theirs, ours in SIDES.items()}
    for name, x in weights.items():
        side, _, rest = name.partition(".blocks.")
        if side in SIDES and rest:
            number, _, part = rest.partition(".")
            layers = stacks[side]
            place, layer = layers[int(number)] if int(number) < len(layers) else (number, nn.Identity())
            ours = _part(part, layer)
            if ours:
                out[f"{SIDES[side]}.layers.{place}.{ours}"] = x
        elif not name.startswith(("quantize.", UNUSED)):
            out[name] = x
    for name in [n for n in out if n.endswith((".q.weight", ".q.bias"))]:
        base, kind = name.rsplit(".", 2)[0], name.rsplit(".", 1)[1]
        out[f"{base}.qkv.{kind}"] = torch.cat([out.pop(f"{base}.{part}.{kind}") for part in "qkv"])
    last = max((n for n in out if n.startswith("decoder.layers.") and n.endswith(".weight")), key=_number)
    out[last] = 2 * out[last]  # pixels from -1 to 1
    bias = last.replace(".weight", ".bias")
    out[bias] = 2 * out[bias] - 1
    return out


def _with_weights(layers: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Those that the released code has, too, by their places here."""
    return [(name, layer) for name, layer in layers.named_children() if next(layer.parameters(), None) is not None]


def _part(part: str, layer: nn.Module) -> str:
    """The name of a tensor within our layer; nothing where we have none for what was never used."""
    word, _, kind = part.partition(".")
    if word == "conv_out":
        return "" if isinstance(getattr(layer, "shortcut", None), nn.Identity) else f"shortcut.{kind}"
    return f"out.{kind}" if word == "proj_out" else kind if word == "conv" else part


def _number(name: str) -> int:
    return int(name.split(".")[2])


# ---- the generator ---------------------------------------------------------------------------------------------------


def is_elm(weights: Mapping[str, Tensor]) -> bool:
    return "layers.0.attention.wqkv.weight" in weights and any(name.startswith("tok_embedder.") for name in weights)


def is_bae(weights: Mapping[str, Tensor]) -> bool:
    return {"ae.quantize.proj.0.weight", "ae.quantize.embed.weight"} <= weights.keys()


def _tables(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Those of the sub-codes, in their order."""
    if "tok_embedder.weight" in weights:
        return [weights["tok_embedder.weight"]]
    return [weights[f"tok_embedder.{i}.weight"] for i in range(sum(n.startswith("tok_embedder.") for n in weights))]


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """bits, parts, classes, width, depth, heads and hidden of a released generator. Raises ValueError for one that
    fills masks."""
    tables = _tables(weights)
    vocab = len(tables[0])
    if vocab & (vocab - 1):
        raise ValueError("this generator of ELM fills masks; those that write row by row are read (gpt/L-2-10.pth)")
    sizes = llamagen.sizes_of(_as_llamagen(weights))
    del sizes["vocab"]
    return sizes | {"bits": len(tables) * (vocab.bit_length() - 1), "parts": len(tables)}


def named_elm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights by our names. Unknown ones keep theirs, and are refused by who loads them."""
    return llamagen.named_llamagen(_as_llamagen(weights))


def _as_llamagen(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with one table and one matrix behind the last norm, those of the sub-codes below each other."""
    out = {n: x for n, x in weights.items() if not n.startswith(("tok_embedder.", "output.")) and n != "proj.weight"}
    tables, names = _tables(weights), sorted((n for n in weights if n.startswith("output.")), key=_place)
    if len(tables) > 1:
        each = weights["proj.weight"].chunk(len(tables), 1)
        tables = [table @ part.T for table, part in zip(tables, each, strict=True)]
    return out | {"tok_embeddings.weight": torch.cat(tables), "output.weight": torch.cat([weights[n] for n in names])}


def _place(name: str) -> int:
    middle = name.split(".")[1]
    return int(middle) if middle.isdigit() else 0
