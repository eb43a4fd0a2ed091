"""Names and shapes of the files of ELM, small: 256 ids of two sub-codes of 4 bits, of pictures of 64 x 64 pixels."""

from support.released_llamagen import CLASSES, DEPTH, HIDDEN, WIDTH
from support.released_llamagen import generator_shapes as llamagen_shapes
from support.released_var import released

PARTS, BITS, CH, INNER = 2, 4, 32, 32  # BITS: of a sub-code
MULTIPLIERS = (1, 2, 4)


def generator_shapes(parts=PARTS):
    out = {n: s for n, s in llamagen_shapes().items() if n not in ("tok_embeddings.weight", "output.weight")}
    numbers = [f".{i}" for i in range(parts)] if parts > 1 else [""]
    for number in numbers:
        out |= {f"{name}{number}.weight": (2**BITS, WIDTH) for name in ("tok_embedder", "output")}
    return out | ({"proj.weight": (WIDTH, parts * WIDTH)} if parts > 1 else {})


def generator_weights(parts=PARTS):
    """Logits with a deviation of three; tables of the size of embeddings."""
    weights = released(generator_shapes(parts))
    return {n: 2 * x if n.startswith("output") else x for n, x in weights.items()}


def autoencoder_shapes(bits=PARTS * BITS, inner=INNER, normed=True):
    """normed: whether a norm begins the decoder."""
    out = {}

    def part(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    def block(name, before, after):
        part(f"{name}.norm1", before)
        part(f"{name}.conv1", after, before, 3, 3)
        part(f"{name}.norm2", after)
        part(f"{name}.conv2", after, after, 3, 3)
        part(f"{name}.conv_out", after, before, 1, 1)

    def attention(name, width):
        part(f"{name}.norm", width)
        for one in ("q", "k", "v", "proj_out"):
            part(f"{name}.{one}", width, width, 1, 1)

    def middle(side, n, width):
        block(f"{side}.blocks.{n}", width, width)
        attention(f"{side}.blocks.{n + 1}", width)
        block(f"{side}.blocks.{n + 2}", width, width)
        return n + 3

    def levels(side, n, before, widths):
        for width in widths:
            for _ in range(2):
                block(f"{side}.blocks.{n}", before, width)
                n, before = n + 1, width
                if width == max(widths):
                    attention(f"{side}.blocks.{n}", width)
                    n += 1
            if width != widths[-1]:
                part(f"{side}.blocks.{n}.conv", width, width, 3, 3)
                n += 1
        return n

    widths = [CH * m for m in MULTIPLIERS]
    side = "ae.encoder"
    part(f"{side}.blocks.0", CH, 3, 3, 3)
    n = middle(side, levels(side, 1, CH, widths), widths[-1])
    part(f"{side}.blocks.{n}", widths[-1])
    part(f"{side}.blocks.{n + 1}", inner, widths[-1], 3, 3)
    part("ae.quantize.proj.0", bits, inner, 1, 1)
    out["ae.quantize.embed.weight"] = (bits, inner)
    side = "ae.generator"
    if normed:
        part(f"{side}.blocks.0", inner)
    part(f"{side}.blocks.{int(normed)}", widths[-1], inner, 3, 3)
    n = levels(side, middle(side, 1 + normed, widths[-1]), widths[-1], widths[::-1])
    part(f"{side}.blocks.{n}", CH)
    part(f"{side}.blocks.{n + 1}", 3, CH, 3, 3)
    part(f"{side}.logsigma.0", CH, CH, 3, 3)
    part(f"{side}.logsigma.2", 3, CH, 1, 1)
    return out


def autoencoder_weights(bits=PARTS * BITS):
    """With what only training needs."""
    return released(autoencoder_shapes(bits) | {"disc.main.0.weight": (4, 3, 4, 4), "disc.main.0.bias": (4,)})


__all__ = [
    "BITS", "CH", "CLASSES", "DEPTH", "HIDDEN", "INNER", "MULTIPLIERS", "PARTS", "WIDTH", "autoencoder_shapes",
    "autoencoder_weights", "generator_shapes", "generator_weights",
]  # fmt: skip
