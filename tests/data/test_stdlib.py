"""The standard library as text: two sides that share no file, and windows that fit."""

import pytest
import torch

from seriatim.data.stdlib import load_stdlib, windows


def test_there_is_enough_text_and_the_held_out_side_is_small():
    text = load_stdlib()
    assert len(text.train) > 5_000_000
    assert 0.01 < len(text.test) / len(text.train) < 0.15


def test_no_file_is_on_both_sides():
    text = load_stdlib()
    train, test = (set(bytes(x.tolist()).split(b"\0")) - {b""} for x in (text.train, text.test))
    assert not {f for f in train & test if len(f) > 100}


def test_windows_are_stretches_of_the_text():
    x = torch.arange(100, dtype=torch.uint8)
    w = windows(x, 20, 10, torch.Generator().manual_seed(0))
    assert w.shape == (20, 10)
    assert bool((w.diff(dim=1) == 1).all())


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="window takes 10"):
        windows(torch.zeros(5, dtype=torch.uint8), 1, 10, torch.Generator())
