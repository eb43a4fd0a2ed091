"""Names and shapes of the files of LlamaGen, small: 256 ids of a picture of 64 x 64 pixels."""

import torch

WIDTH, HEADS, DEPTH, HIDDEN, CLASSES, VOCAB, DIM, CH, INNER = 128, 2, 2, 192, 5, 48, 8, 32, 16
MULTIPLIERS = (1, 2, 4)


def tokenizer_shapes(dim=DIM):
    out = {"quantize.embedding.weight": (VOCAB, dim), "quantize.codebook_used": (65536,)}

    def part(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    def block(name, before, after):
        part(f"{name}.norm1", before)
        part(f"{name}.conv1", after, before, 3, 3)
        part(f"{name}.norm2", after)
        part(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            part(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name, width):
        part(f"{name}.norm", width)
        for one in ("q", "k", "v", "proj_out"):
            part(f"{name}.{one}", width, width, 1, 1)

    widths, last = [CH * m for m in MULTIPLIERS], len(MULTIPLIERS) - 1
    part("quant_conv", dim, INNER, 1, 1)
    part("post_quant_conv", INNER, dim, 1, 1)
    for side, sample in (("encoder", "downsample"), ("decoder", "upsample")):
        up = side == "decoder"
        before = widths[-1] if up else CH
        part(f"{side}.conv_in", before, INNER if up else 3, 3, 3)
        for i, width in enumerate(reversed(widths) if up else widths):
            name = f"{side}.conv_blocks.{i}"
            for j in range(2 + up):
                block(f"{name}.res.{j}", before, width)
                before = width
                if i == (0 if up else last):
                    attention(f"{name}.attn.{j}", before)
            if i != last:
                part(f"{name}.{sample}.conv", before, before, 3, 3)
        block(f"{side}.mid.0", widths[-1], widths[-1])
        attention(f"{side}.mid.1", widths[-1])
        block(f"{side}.mid.2", widths[-1], widths[-1])
        part(f"{side}.norm_out", before)
        part(f"{side}.conv_out", 3 if up else INNER, before, 3, 3)
    return out


def generator_shapes(w=WIDTH, depth=DEPTH):
    out = {
        "cls_embedding.embedding_table.weight": (CLASSES + 1, w), "tok_embeddings.weight": (VOCAB, w),
        "norm.weight": (w,), "output.weight": (VOCAB, w),
    }  # fmt: skip
    for i in range(depth):
        layer = f"layers.{i}."
        out |= {
            layer + "attention.wqkv.weight": (3 * w, w), layer + "attention.wo.weight": (w, w),
            layer + "feed_forward.w1.weight": (HIDDEN, w), layer + "feed_forward.w3.weight": (HIDDEN, w),
            layer + "feed_forward.w2.weight": (w, HIDDEN), layer + "attention_norm.weight": (w,),
            layer + "ffn_norm.weight": (w,),
        }  # fmt: skip
    return out


def ids():
    return torch.randint(VOCAB, (2, 256), generator=torch.Generator().manual_seed(7))


def sharper(weights):
    """Logits with a deviation of three."""
    return weights | {"output.weight": 2 * weights["output.weight"]}
