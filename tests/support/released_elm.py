"""Names and shapes of the files of ELM, small: 256 ids of two sub-codes of 4 bits, of pictures of 64 x 64 pixels."""

from support.released_llamagen import CLASSES, DEPTH, HIDDEN, WIDTH
from support.released_llamagen import generator_shapes as llamagen_shapes
from support.released_var import released

PARTS, BITS, CH, INNER = 2, 4, 32, 32  # BITS: of a sub-code
MULTIPLIERS = (1, 2, 4)
NORM, RESIDUAL, ATTENTION, CONV, SAMPLE = range(5)


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


def blocks(up):
    """Kind and widths of each block of the encoder, or of the decoder."""
    widths = [CH * m for m in MULTIPLIERS]
    last, now = widths[-1], widths[-1] if up else CH
    middle = [(RESIDUAL, last, last), (ATTENTION, last, last), (RESIDUAL, last, last)]
    out = [(NORM, INNER, INNER), (CONV, INNER, last), *middle] if up else [(CONV, 3, CH)]
    for i, width in enumerate(reversed(widths) if up else widths):
        for _ in range(2):
            out.append((RESIDUAL, now, width))
            now = width
            if width == last:
                out.append((ATTENTION, now, now))
        if i < len(widths) - 1:
            out.append((SAMPLE, now, now))
    return [*out, *([] if up else middle), (NORM, now, now), (CONV, now, 3 if up else INNER)]


def autoencoder_shapes(bits=PARTS * BITS):
    out = {"ae.quantize.embed.weight": (bits, INNER)}

    def part(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    part("ae.quantize.proj.0", bits, INNER, 1, 1)
    for side in ("encoder", "generator"):
        for i, (kind, before, after) in enumerate(blocks(side == "generator")):
            name = f"ae.{side}.blocks.{i}"
            if kind == NORM:
                part(name, before)
            elif kind == CONV:
                part(name, after, before, 3, 3)
            elif kind == SAMPLE:
                part(f"{name}.conv", after, before, 3, 3)
            elif kind == ATTENTION:
                part(f"{name}.norm", before)
                for one in ("q", "k", "v", "proj_out"):
                    part(f"{name}.{one}", before, before, 1, 1)
            else:
                part(f"{name}.norm1", before)
                part(f"{name}.conv1", after, before, 3, 3)
                part(f"{name}.norm2", after)
                part(f"{name}.conv2", after, after, 3, 3)
                part(f"{name}.conv_out", after, before, 1, 1)
    return out


def autoencoder_weights():
    """With what only training needs."""
    made = released(autoencoder_shapes())
    for name in ("weight", "bias"):
        made |= released({f"ae.generator.logsigma.0.{name}": (CH,), f"disc.main.0.{name}": (4,)})
    return made


__all__ = [
    "BITS", "CH", "CLASSES", "DEPTH", "HIDDEN", "INNER", "MULTIPLIERS", "PARTS", "WIDTH", "autoencoder_weights",
    "generator_weights",
]  # fmt: skip
