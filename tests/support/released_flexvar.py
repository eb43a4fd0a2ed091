"""Names and shapes of the files of FlexVAR and SAR, small: ten scales of pictures of 64 x 64 pixels."""

from support.released_llamagen import VOCAB
from support.released_var import generator_shapes, released

WIDTH, DEPTH, CLASSES, DIM, GRID = 64, 2, 5, 32, 32


def shapes():
    """VAR's, but one map of places and no vectors of scales."""
    out = generator_shapes() | {
        "word_embed.weight": (WIDTH, DIM), "pos_1LC": (1, WIDTH, GRID, GRID), "head.weight": (VOCAB, WIDTH),
        "head.bias": (VOCAB,), "attn_bias_for_masking": (1, 1, 680, 680),
    }  # fmt: skip
    return {name: shape for name, shape in out.items() if name not in ("lvl_embed.weight", "lvl_1L")}


def weights():
    """Places as large as what stands there."""
    made = released(shapes())
    return made | {"pos_1LC": 128 * made["pos_1LC"]}
