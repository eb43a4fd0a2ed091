"""OLMo 2 (arXiv 2501.00656): norms behind each branch, and of all queries and all keys together."""

from seriatim.interop.blueprint import Blueprint
from seriatim.interop.families.llama import biases, decoder
from seriatim.interop.fields import Fields

NAMES = {"norm1": None, "norm2": None, "post1": "post_attention_layernorm", "post2": "post_feedforward_layernorm"}


def read(f: Fields) -> Blueprint:
    return decoder(f, names=NAMES, eps=1e-5, place="post", qk_norm="rms_all", bias=biases(f))
