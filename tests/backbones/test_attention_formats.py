"""In which number format keys and values are remembered."""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones.attention import fast_to_attend
from seriatim.backbones.transformer import Transformer, TransformerConfig


@pytest.mark.parametrize(
    ("has", "kept"),
    [
        ({"avx512_bf16": True}, torch.bfloat16), ({"avx512_bf16": True, "amx_bf16": True}, torch.float32),
        ({"avx512_bf16": False}, torch.float32), ({}, torch.float32),
    ],
)  # fmt: skip
def test_bfloat16_is_kept_where_attention_over_it_is_fast(monkeypatch, has, kept):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    shape = {"width": 16, "depth": 1, "heads": 2}
    assert Transformer(TransformerConfig(**shape)).bfloat16().new_cache(1).dtype == kept
    assert Transformer(TransformerConfig(**shape)).new_cache(1).dtype == torch.float32
    capped = Transformer(TransformerConfig(**shape, softcap=5.0)).bfloat16().new_cache(1)
    assert capped.dtype == torch.float32, "capped scores are products of their own, which bfloat16 slows"
    assert fast_to_attend(torch.bfloat16, "cuda") and fast_to_attend(torch.float64, "cpu")
