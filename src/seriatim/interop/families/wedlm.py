"""WeDLM (Liu et al. 2025, arXiv 2512.22737): Qwen2.5 or Qwen3 trained on to decide masks with causal attention, for
which what is known stands before what is not."""

from seriatim.interop.blueprint import MaskedBlueprint, masked
from seriatim.interop.families.llama import decoder
from seriatim.interop.fields import Fields

END_OF_TEXT, END_OF_TURN = 151_643, 151_645


def read(f: Fields) -> MaskedBlueprint:
    f.must("use_sliding_window", False)
    f.take("sliding_window", "max_window_layers", "layer_types")  # of which there is none
    f.presume(max_position_embeddings=32_768, num_key_value_heads=32)
    plan = decoder(
        f, bias=("qkv",) if f.take("attention_bias", default=True) else (),
        qk_norm="rms" if f.take("qk_norm", default=False) else None,
    )  # fmt: skip
    return masked(
        plan, f.where, f.number("mask_token_id", least=0), causal=True, within=16, rule="entropy", threshold=-0.4,
        ends=tuple(i for i in (END_OF_TEXT, END_OF_TURN) if i < plan.vocab), sampling={"temperature": 0.0},
    )  # fmt: skip
