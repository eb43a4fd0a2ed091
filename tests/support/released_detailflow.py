"""Names and shapes of the files of DetailFlow, small: 16 ids in groups of 4, of pictures of 32 x 32 pixels."""

from support.released_llamagen import WIDTH, sharper
from support.released_llamagen import generator_shapes as llamagen_shapes
from support.released_var import released

SIDE, PATCH, PATCHES, QUERIES, GROUP, VOCAB, DIM = 32, 2, 256, 16, 4, 64, 8
ENCODER, INNER, DECODER, DEPTH = 128, 192, 64, 2  # widths, and layers of each


def tokenizer_shapes():
    """Without what only training needs."""
    out = {
        "quantize.embedding.weight": (VOCAB, DIM), "quantize.codebook_used": (65536,),
        "decoder.mask_token": (1, 1, DECODER),
    }  # fmt: skip

    def part(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    part("quant_conv", DIM, ENCODER)
    part("post_quant_conv", DECODER, DIM)
    part("refine_conv", ENCODER, DIM)
    part("decoder.to_pixel.model", 3 * PATCH**2, DECODER)
    part("encoder.visual_model.embeddings.patch_embedding", ENCODER, 3 * PATCH**2)
    for name in ("latent_tokens", "refined_tokens"):
        out[f"encoder.{name}"] = (1, QUERIES, ENCODER)
    for side, w, inner in (("encoder", ENCODER, INNER), ("decoder", DECODER, 4 * DECODER)):
        out[f"{side}.latent_pos_embed"] = (1, QUERIES, w)
        out[f"{side}.visual_model.embeddings.position_embedding.weight"] = (PATCHES, w)
        part(f"{side}.visual_model.post_layernorm", w)
        for i in range(DEPTH):
            layer = f"{side}.visual_model.encoder.layers.{i}"
            for norm in ("layer_norm1", "layer_norm2"):
                part(f"{layer}.{norm}", w)
            for matrix in ("q_proj", "k_proj", "v_proj", "out_proj"):
                part(f"{layer}.self_attn.{matrix}", w, w)
            part(f"{layer}.mlp.fc1", inner, w)
            part(f"{layer}.mlp.fc2", w, inner)
    return out


def tokenizer_weights():
    return released(tokenizer_shapes())


def generator_shapes():
    table = {name: (VOCAB, WIDTH) for name in ("tok_embeddings.weight", "output.weight")}
    return llamagen_shapes() | table | {"spe_tok_embeddings.special_embeddings.weight": (GROUP - 1, WIDTH)}


def generator_weights():
    return sharper(released(generator_shapes()))
