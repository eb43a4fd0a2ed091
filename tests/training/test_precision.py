"""bfloat16 is used where it is asked for and gains time."""

import pytest
import torch

from seriatim.training import precision

X86 = {"architecture": "x86_64", "cpu_name": "Some Processor", "avx512_f": True}


@pytest.fixture(autouse=True)
def fresh():
    precision.why_not_bfloat16.cache_clear()
    yield
    precision.why_not_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("device", "has", "gains"),
    [
        ("cpu", X86, False),
        ("cpu", {**X86, "avx512_bf16": True}, True),
        ("cpu", {**X86, "amx_bf16": True}, True),
        ("cpu", {"architecture": "aarch64"}, True),
        ("cuda", X86, True),
    ],
)
def test_a_processor_without_instructions_for_it_trains_in_float32(monkeypatch, device, has, gains):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert (precision.why_not_bfloat16(device) is None) == gains
    if device == "cpu":
        with precision.autocast(device, bf16=True):
            assert torch.is_autocast_enabled(device) == gains
        with precision.autocast(device, bf16=False):
            assert not torch.is_autocast_enabled(device)


def test_where_nothing_is_known_it_is_used(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.why_not_bfloat16("cpu") is None
