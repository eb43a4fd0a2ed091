"""Names and shapes of the files of VAR and its kin, small, and weights for them that follow from the names alone."""

import hashlib

import torch

WIDTH, HEADS, DEPTH, CLASSES, VOCAB, DIM, CH = 64, 2, 2, 5, 32, 32, 32
SCALES = (1, 2, 3, 4)  # of pictures of 64 x 64 pixels


def tokenizer_shapes():
    out = {"quantize.embedding.weight": (VOCAB, DIM), "quantize.ema_vocab_hit_SV": (len(SCALES), VOCAB)}

    def conv(name, after, before, size):
        out[f"{name}.weight"], out[f"{name}.bias"] = (after, before, size, size), (after,)

    def norm(name, width):
        out[f"{name}.weight"], out[f"{name}.bias"] = (width,), (width,)

    def block(name, before, after):
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", after, before, 3)
        norm(f"{name}.norm2", after)
        conv(f"{name}.conv2", after, after, 3)
        if before != after:
            conv(f"{name}.nin_shortcut", after, before, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        conv(f"{name}.qkv", 3 * width, width, 1)
        conv(f"{name}.proj_out", width, width, 1)

    widths = [CH * m for m in (1, 1, 2, 2, 4)]
    for i in range(4):
        conv(f"quantize.quant_resi.qresi_ls.{i}", DIM, DIM, 3)
    conv("quant_conv", DIM, DIM, 3)
    conv("post_quant_conv", DIM, DIM, 3)
    for side, edge, before in (("encoder", "down", CH), ("decoder", "up", widths[-1])):
        conv(f"{side}.conv_in", before, 3 if side == "encoder" else DIM, 3)
        for i in range(5) if side == "encoder" else reversed(range(5)):
            for j in range(2 + (side == "decoder")):
                block(f"{side}.{edge}.{i}.block.{j}", before, widths[i])
                before = widths[i]
                if i == 4:
                    attention(f"{side}.{edge}.{i}.attn.{j}", before)
            if i != (4 if side == "encoder" else 0):
                conv(f"{side}.{edge}.{i}.{edge}sample.conv", before, before, 3)
        block(f"{side}.mid.block_1", widths[-1], widths[-1])
        attention(f"{side}.mid.attn_1", widths[-1])
        block(f"{side}.mid.block_2", widths[-1], widths[-1])
        norm(f"{side}.norm_out", before)
        conv(f"{side}.conv_out", DIM if side == "encoder" else 3, before, 3)
    return out


def generator_shapes(shared=False, w=WIDTH, heads=HEADS):
    total = sum(n * n for n in SCALES)
    out = {
        "pos_start": (1, 1, w), "pos_1LC": (1, total, w), "lvl_1L": (1, total),
        "attn_bias_for_masking": (1, 1, total, total), "word_embed.weight": (w, DIM), "word_embed.bias": (w,),
        "class_emb.weight": (CLASSES + 1, w), "lvl_embed.weight": (len(SCALES), w),
        "head_nm.ada_lin.1.weight": (2 * w, w), "head_nm.ada_lin.1.bias": (2 * w,), "head.weight": (VOCAB, w),
        "head.bias": (VOCAB,),
    }  # fmt: skip
    if shared:
        out |= {"shared_ada_lin.1.weight": (6 * w, w), "shared_ada_lin.1.bias": (6 * w,)}
    for i in range(DEPTH):
        b = f"blocks.{i}."
        out |= {
            b + "attn.scale_mul_1H11": (1, heads, 1, 1), b + "attn.q_bias": (w,), b + "attn.v_bias": (w,),
            b + "attn.zero_k_bias": (w,), b + "attn.mat_qkv.weight": (3 * w, w), b + "attn.proj.weight": (w, w),
            b + "attn.proj.bias": (w,), b + "ffn.fc1.weight": (4 * w, w), b + "ffn.fc1.bias": (4 * w,),
            b + "ffn.fc2.weight": (w, 4 * w), b + "ffn.fc2.bias": (w,),
        }  # fmt: skip
        out |= {b + "ada_gss": (1, 1, 6, w)} if shared else {}
        out |= {} if shared else {b + "ada_lin.1.weight": (6 * w, w), b + "ada_lin.1.bias": (6 * w,)}
    return out


def released(shapes):
    """Weights as large as those that were trained, gates among them; each drawn by its own name."""
    out = {}
    for name, shape in shapes.items():
        g = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        x = torch.randn(shape, generator=g)
        last = name.rsplit(".", 2)[-2] if "." in name else ""
        if name in ("lvl_1L", "attn_bias_for_masking") or name.endswith(("zero_k_bias", "ema_vocab_hit_SV")):
            x = torch.zeros(shape)
        elif name.endswith("scale_mul_1H11"):
            x = 1.2 + 0.4 * x
        elif "norm" in last and name.endswith("weight"):
            x = 1 + 0.2 * x
        elif len(shape) == 4:
            x = 1.4 * x / x[0].numel() ** 0.5
        elif len(shape) == 2 and "emb" not in name.replace("word_embed", ""):
            x = 1.6 * x / shape[1] ** 0.5
        elif "emb" not in name.replace("word_embed", ""):
            x = 0.3 * x
        out[name] = x
    return out


def pictures():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
