"""mT5 (Xue et al. 2020, arXiv 2010.11934): T5 1.1 over a hundred languages, with sizes of its own where a file says
none. Outputs are not scaled, and have a table of their own, whatever the file says of tied ones: what is stored tells
(`interop.weights.as_trained`)."""

from __future__ import annotations

from seriatim.interop.blueprint import EncoderDecoderBlueprint
from seriatim.interop.families import t5
from seriatim.interop.fields import Fields


def read(f: Fields) -> EncoderDecoderBlueprint:
    f.presume(
        vocab_size=250_112, d_ff=1024, num_heads=6, num_layers=8, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, scale_decoder_outputs=False,
    )  # fmt: skip
    return t5.read(f)
