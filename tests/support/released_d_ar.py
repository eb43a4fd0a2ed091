"""Names and shapes of the files of D-AR, small: a tokenizer of 32 codes, and a generator beside it."""

import torch

from support.released_llamagen import WIDTH, sharper
from support.released_llamagen import generator_shapes as llamagen_shapes
from support.released_var import released

VOCAB = 32


def tokenizer_shapes():
    """Names and shapes of the tensors of a file, at this size, but for those that only training needs."""
    w = WIDTH
    out = {
        "patchify.weight": (w, 3, 4, 4), "patchify.bias": (w,), "quant_in_conv.weight": (8, w, 1, 1),
        "quant_out_conv.weight": (w, 8, 1, 1), "quantize.embedding.weight": (32, 8),
        "query_embedding.weight": (1024, 8), "query_linear.weight": (w, 8), "query_linear.bias": (w,),
        "decoder_embedding.weight": (1024, w),
    }  # fmt: skip
    flow = "diff_decoder.net."
    for name, out_size, in_size in (
        ("cond_mlp", (w,), (w,)),
        ("conv_in", (w,), (48, 1, 1)),
        ("conv_out", (48,), (w, 1, 1)),
    ):
        out |= {f"{flow}{name}.weight": (*out_size, *in_size), f"{flow}{name}.bias": out_size}
    for stack in ("encoder_layers.0.", "decoder_layers.0.", flow + "blocks.0."):
        linear = {
            "mlp.fc1": (4 * w, w),
            "mlp.fc2": (w, 4 * w),
            **{f"attention.{x}": (w, w) for x in ("q", "k", "v", "proj")},
        }
        norms = {"attention.q_norm": 64, "attention.k_norm": 64}
        if "blocks" in stack:
            linear |= {f"cross_attn.{x}": (w, w) for x in ("q", "k", "v", "proj")}
            linear |= {f"{x}.{i}": (w, w) for x in ("time_embed.mlp", "cond_embed") for i in (0, 2)}
            linear["adaLN_modulation.1"] = (6 * w, w)
            norms |= {"cross_attn.q_norm": 64, "cross_attn.k_norm": 64}
        else:
            out |= {stack + "gate1": (w,), stack + "gate2": (w,)}
            norms |= {"norm1": w, "norm2": w}
        for name, shape in (linear | {n: (size,) for n, size in norms.items()}).items():
            out |= {f"{stack}{name}.weight": shape, f"{stack}{name}.bias": shape[:1]}
    return out


def tokenizer_weights():
    """Weights as large as those that were trained, gates among them."""
    g, out = torch.Generator().manual_seed(0), {}
    for name, shape in sorted(tokenizer_shapes().items()):
        x = torch.randn(shape, generator=g)
        if "embedding" not in name:
            norm = ("norm" in name and name.endswith("weight")) or "gate" in name
            x = 1.6 * x / x[0].numel() ** 0.5 if len(shape) > 1 else 0.4 * x + float(norm)
        out[name] = x
    return out


def generator_weights():
    table = {name: (VOCAB, WIDTH) for name in ("tok_embeddings.weight", "output.weight")}
    return sharper(released(llamagen_shapes() | table))
