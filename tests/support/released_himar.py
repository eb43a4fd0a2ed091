"""Names and shapes of the files of Hi-MAR, small: 4 x 4 pivots and 16 x 16 latents of pictures of 64 x 64 pixels."""

from support.released_mar import BLOCKS, CLASSES, DEPTH, DIM, HIDDEN, WIDTH, balanced, denoiser_shapes, part
from support.released_var import released

SIDE, PIVOTS, BUFFER, WIDE, LAYERS = 16, 4, 3, 128, 2  # WIDE, LAYERS: of the map's transformer
EACH = PIVOTS**2 + SIDE**2  # elements


def generator_shapes(w=WIDTH):
    out = {
        "fake_latent": (1, w), "cond_tokens": (1, PIVOTS**2, DIM), "mask_token": (1, 2 * EACH, w),
        "class_emb.weight": (CLASSES, w), "diffusion_pos_embed_learned": (1, EACH, w),
    }  # fmt: skip
    part(out, "z_proj", w, DIM)
    part(out, "z_proj_ln", w)
    part(out, "cond_z_proj", w, w)
    part(out, "cond_proj", w, DIM)
    part(out, "decoder_embed", w, w)
    for stack in ("encoder", "decoder"):
        out[f"{stack}_pos_embed_learned"] = (1, 2 * (BUFFER + EACH), w)
        out[f"{stack}_task_emb.weight"] = (2, w)
        part(out, f"{stack}_blocks_ada.1", 4 * w, w)
        part(out, f"{stack}_norm", w)
        for i in range(DEPTH):
            layer = f"{stack}_blocks.{i}."
            out |= {layer + "adaLN_scale": (2, 1, 1, 4 * w), layer + "adaLN_shift": (2, 1, 1, 4 * w)}
            part(out, layer + "norm1", w)
            part(out, layer + "attn.qkv", 3 * w, w)
            part(out, layer + "attn.proj", w, w)
            part(out, layer + "norm2", w)
            part(out, layer + "mlp.fc1", 4 * w, w)
            part(out, layer + "mlp.fc2", w, 4 * w)
    return out | denoiser_shapes("diffloss.net.", w) | map_shapes("cond_diffloss.net.", w)


def map_shapes(net, width, w=WIDE):
    """The transformer of the map."""
    out = {net + "pos_embed": (1, SIDE**2, w), net + "c_pos_embed": (1, SIDE**2, w)}
    part(out, net + "x_embedder.proj", w, DIM, 1, 1)
    part(out, net + "c_embedder.proj", w, width, 1, 1)
    part(out, net + "t_embedder.mlp.0", w, 256)
    part(out, net + "t_embedder.mlp.2", w, w)
    for i in range(LAYERS):
        layer = f"{net}blocks.{i}."
        part(out, layer + "attn.qkv", 3 * w, w)
        part(out, layer + "attn.proj", w, w)
        part(out, layer + "mlp.fc1", 4 * w, w)
        part(out, layer + "mlp.fc2", w, 4 * w)
        part(out, layer + "adaLN_modulation.1", 6 * w, w)
    part(out, net + "final_layer.linear", DIM, w)
    part(out, net + "final_layer.adaLN_modulation.1", 2 * w, w)
    return out


def generator_weights():
    """As large as those that were trained; pivots and masks say something of the size of what they are told."""
    weights = balanced(released(generator_shapes()))
    for name in ("cond_proj.weight", "cond_z_proj.weight", "cond_tokens"):
        weights[name] = 2 * weights[name]
    for i in range(LAYERS):  # else the map's attention is all but hard, and magnifies what is rounded
        for name in (f"cond_diffloss.net.blocks.{i}.{inner}.weight" for inner in ("attn.qkv", "adaLN_modulation.1")):
            weights[name] = weights[name] / 2
    return weights


__all__ = [
    "BLOCKS", "BUFFER", "CLASSES", "DEPTH", "DIM", "HIDDEN", "PIVOTS", "SIDE", "WIDE", "WIDTH", "generator_shapes",
    "generator_weights",
]  # fmt: skip
