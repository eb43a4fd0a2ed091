"""Systems of any kind are loaded in the number format that is asked for, and then do all that they did."""

from __future__ import annotations

import pytest
import torch

import seriatim

PICTURES = ["zoo:flexvar", "zoo:hmar", "zoo:mar", "zoo:raster-ar", "zoo:var"]
TEXTS = ["zoo:text-as-arm", "zoo:text-base", "zoo:text-block", "zoo:text-lists", "zoo:text-mdlm"]
LABELS = torch.tensor([0, 7])


@pytest.mark.parametrize("source", PICTURES)
def test_pictures_are_drawn_and_repainted_in_bfloat16(source):
    """Codes are as they would be but for rounding; what is handed out is float32, and what is kept stays."""
    system, exact = seriatim.load(source, dtype="bfloat16"), seriatim.load(source)
    assert {p.dtype for p in system.model.parameters()} == {torch.bfloat16}
    made = system.draw(LABELS, film=True)
    assert {x.dtype for x in (made.images, *made.frames)} == {torch.float32} and bool(made.images.isfinite().all())
    drawn = exact.draw(LABELS).images
    codes, expected = system.elements(drawn, system.model.layout), exact.elements(drawn, exact.model.layout)
    assert (codes.float() - expected.float()).abs().gt(0.05).float().mean() < 0.1
    keep = torch.zeros(drawn.shape[2:], dtype=torch.bool)
    keep[: len(keep) // 2] = True
    assert torch.equal(system.repaint(drawn, keep, LABELS).images[..., keep], drawn[..., keep])


@pytest.mark.parametrize("source", TEXTS)
def test_texts_are_written_in_bfloat16(source):
    system = seriatim.load(source, dtype="bfloat16")
    assert {p.dtype for p in system.model.parameters()} == {torch.bfloat16}
    assert system.write("def ", 24)
