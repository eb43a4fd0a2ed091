"""Names and shapes of the files of MAR, small: 4 x 4 latents of pictures of 16 x 16 pixels."""

WIDTH, DEPTH, CLASSES, SIDE, DIM, CH, BUFFER, HIDDEN, BLOCKS = 128, 2, 5, 4, 6, 32, 3, 48, 2
MULTIPLIERS = (1, 2, 4)


def part(out, name, *shape):
    out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]


def autoencoder_shapes(dim=DIM):
    """KL-16: its encoder attends at the lowest resolution, its decoder in the middle only."""
    out = {}

    def block(name, before, after):
        part(out, f"{name}.norm1", before)
        part(out, f"{name}.conv1", after, before, 3, 3)
        part(out, f"{name}.norm2", after)
        part(out, f"{name}.conv2", after, after, 3, 3)
        if before != after:
            part(out, f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name, width):
        part(out, f"{name}.norm", width)
        for one in ("q", "k", "v", "proj_out"):
            part(out, f"{name}.{one}", width, width, 1, 1)

    widths, last = [CH * m for m in MULTIPLIERS], len(MULTIPLIERS) - 1
    part(out, "quant_conv", 2 * dim, 2 * dim, 1, 1)
    part(out, "post_quant_conv", dim, dim, 1, 1)
    for side, edge in (("encoder", "down"), ("decoder", "up")):
        up = side == "decoder"
        before = widths[-1] if up else CH
        part(out, f"{side}.conv_in", before, dim if up else 3, 3, 3)
        for i in reversed(range(3)) if up else range(3):
            for j in range(2 + up):
                block(f"{side}.{edge}.{i}.block.{j}", before, widths[i])
                before = widths[i]
                if i == last and not up:
                    attention(f"{side}.{edge}.{i}.attn.{j}", before)
            if i != (0 if up else last):
                part(out, f"{side}.{edge}.{i}.{edge}sample.conv", before, before, 3, 3)
        block(f"{side}.mid.block_1", widths[-1], widths[-1])
        attention(f"{side}.mid.attn_1", widths[-1])
        block(f"{side}.mid.block_2", widths[-1], widths[-1])
        part(out, f"{side}.norm_out", before)
        part(out, f"{side}.conv_out", 3 if up else 2 * dim, before, 3, 3)
    return out


def generator_shapes(w=WIDTH):
    n = SIDE**2
    out = {
        "fake_latent": (1, w), "mask_token": (1, 1, w), "class_emb.weight": (CLASSES, w),
        "encoder_pos_embed_learned": (1, BUFFER + n, w), "decoder_pos_embed_learned": (1, BUFFER + n, w),
        "diffusion_pos_embed_learned": (1, n, w),
    }  # fmt: skip
    part(out, "z_proj", w, DIM)
    part(out, "decoder_embed", w, w)
    for norm in ("z_proj_ln", "encoder_norm", "decoder_norm"):
        part(out, norm, w)
    for i in range(DEPTH):
        for stack in ("encoder", "decoder"):
            layer = f"{stack}_blocks.{i}."
            part(out, layer + "norm1", w)
            part(out, layer + "attn.qkv", 3 * w, w)
            part(out, layer + "attn.proj", w, w)
            part(out, layer + "norm2", w)
            part(out, layer + "mlp.fc1", 4 * w, w)
            part(out, layer + "mlp.fc2", w, 4 * w)
    return out | denoiser_shapes("diffloss.net.", w)


def denoiser_shapes(net, width, hidden=HIDDEN, blocks=BLOCKS):
    """The network of the head."""
    out = {}
    part(out, net + "time_embed.mlp.0", hidden, 256)
    part(out, net + "time_embed.mlp.2", hidden, hidden)
    part(out, net + "cond_embed", hidden, width)
    part(out, net + "input_proj", hidden, DIM)
    for i in range(blocks):
        block = f"{net}res_blocks.{i}."
        part(out, block + "in_ln", hidden)
        part(out, block + "mlp.0", hidden, hidden)
        part(out, block + "mlp.2", hidden, hidden)
        part(out, block + "adaLN_modulation.1", 3 * hidden, hidden)
    part(out, net + "final_layer.linear", 2 * DIM, hidden)
    part(out, net + "final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return out


def balanced(weights):
    """Weights of `released` by which layers and head say something of the size of what they are told."""
    out = {}
    for name, x in weights.items():
        if "_ln." in name and name.endswith("weight"):
            x = 1 + x
        elif "embed" in name and x.dim() < 3:
            x = x / x.shape[1] ** 0.5 if x.dim() == 2 else 0.3 * x
        elif "final_layer.linear" in name:
            x = 0.3 * x
        out[name] = x
    return out
