"""Names and shapes of the files of HMAR, small: one layer of both ends, two of each."""

from support.released_var import DEPTH, WIDTH, generator_shapes, released

SHARED, FORK = 1, DEPTH


def shapes():
    """VAR's, but layers in three lists, two heads, and the bias of the input apart."""
    out = {}
    for name, shape in generator_shapes().items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            out |= {f"{kind}_blocks.{number}.{rest}": shape for kind in ("ns", "mask")}
            if int(number) < SHARED:
                out[f"base_blocks.{number}.{rest}"] = shape
        elif name.startswith("head"):
            out |= {f"{kind}_{name}": shape for kind in ("ns", "mask")}
        else:
            out[name] = shape
    out["word_embed_bias"] = out.pop("word_embed.bias")
    return out | {"mask_embed.weight": (1, WIDTH)}


def weights():
    """Places so far apart that ids differ among them."""
    made = released(shapes())
    return made | {"pos_1LC": 5 * made["pos_1LC"]}
