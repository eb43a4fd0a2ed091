"""The survey of vision: reading its map, its statements, its claim, and a page that is the same whenever it is made."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math

import pytest
import torch
from PIL import Image

from seriatim.studies.ar_vision_survey import (
    CLAIM,
    ELEMENTS,
    LEVELS,
    REPRESENTATIVES,
    coverage,
    growing,
    measure,
    report,
    restored,
    select,
    statements,
    way,
)
from seriatim.systems.image_taxonomy import Row, row, toy
from seriatim.systems.meta import catalogue, studies

PIXEL = Row(
    "p", "Pixels", "pixel", "ids", "one by one, row by row", (1, 1), "all before", "value", "categorical",
    "exact", (64, 256, 1024), (64, 256, 1024), "n²", "n²", ("class", "in-painting"),
)  # fmt: skip
TOKEN = dataclasses.replace(PIXEL, key="t", level="token", steps=(4, 16, 64), forwards=(4, 16, 64), tasks=("class",))
FAST = dataclasses.replace(TOKEN, key="f", order="anti-diagonals", groups=(1, 8), forwards=(3, 7, 15), growth="n")
SCALE = dataclasses.replace(
    TOKEN, key="s", level="scale", order="map by map", groups=(1, 64), forwards=(2, 3, 4), growth="log n"
)
NOISE = dataclasses.replace(TOKEN, key="n", element="vectors", order="all at once", groups=(64, 64))
ROWS = [PIXEL, TOKEN, FAST, SCALE, NOISE]


def held(rows, measured=None):
    return [s.holds for s in statements(rows, measured)]


def test_representatives_are_systems_of_pictures():
    assert "ar-vision-survey" in studies()
    assert all(catalogue()[key][0].family == "image" for key in REPRESENTATIVES.values())


def test_rows_are_found_by_any_field():
    for f in dataclasses.fields(Row):
        for wanted in {getattr(r, f.name) for r in ROWS}:
            found = select(ROWS, **{f.name: wanted})
            assert found == [r for r in ROWS if getattr(r, f.name) == wanted], f.name
    assert select(ROWS, tasks="in-painting") == [PIXEL] and select(ROWS, tasks="class", level="scale") == [SCALE]
    assert select(ROWS) == ROWS and select(ROWS, level="token", growth="log n") == []
    with pytest.raises(ValueError, match="rows have no colour; they have cache, element"):
        select(ROWS, colour="red")


def test_each_row_stands_in_one_cell_and_empty_cells_are_those_that_could_be_filled():
    found = coverage(ROWS)
    assert sorted(key for keys in found.cells.values() for key in keys) == ["f", "n", "p", "s", "t"]
    assert found.cells["token", "ids", "several a step"] == ("f",) and [way(r) for r in (PIXEL, NOISE)] == [
        "one by one", "all at once",
    ]  # fmt: skip
    assert ("token", "vectors", "one by one") in found.empty and ("pixel", "ids", "one by one") not in found.empty
    assert ("pixel", ELEMENTS[0], "several a step") in found.empty
    assert found.tasks["in-painting"] == ("p",) and found.tasks["video"] == ()


def test_statements_hold_or_fail_by_the_columns():
    assert held(ROWS) == [True, True, True, True, None]
    slow = dataclasses.replace(SCALE, forwards=(2, 8, 2000), growth="n²")
    bound = dataclasses.replace(PIXEL, likelihood="bound")
    assert held([bound, TOKEN, slow]) == [False, False, True, False, None]
    assert held([TOKEN, SCALE])[2] is None
    half = dataclasses.replace(TOKEN, forwards=(8, 32, 128))
    assert held([PIXEL, half, SCALE])[2] is False


def trained(bits, forwards, likelihood="exact", tokenizer="image-vq"):
    return {"bits_per_code": bits, "forwards": forwards, "likelihood": likelihood, "tokenizer": tokenizer}


@pytest.mark.parametrize(
    ("measured", "holds"),
    [
        ({"t": trained(5.0, 64), "f": trained(5.5, 15)}, True),
        ({"t": trained(5.5, 64), "f": trained(5.0, 15)}, False),
        ({"t": trained(5.5, 64)}, None),
        ({"t": trained(5.5, 64), "f": trained(5.0, 15, tokenizer="pixels")}, None),
        ({"t": trained(5.5, 64), "f": trained(5.0, 15, "bound")}, None),
    ],
)
def test_bits_are_compared_over_the_ids_of_one_tokenizer(measured, holds):
    assert held(ROWS, measured)[-1] is holds


# ---- the claim -------------------------------------------------------------------------------------------------------


def test_forwards_grow_with_the_square_in_raster_order_and_with_the_logarithm_by_scales():
    raster, scales, neighbours = (
        growing(REPRESENTATIVES[k])(None, 0) for k in (CLAIM.baseline, CLAIM.ours, "neighbours")
    )
    assert raster["growth"] == 16 and raster["forwards"] == [4, 16, 64]
    assert scales["growth"] == 2 and neighbours["growth"] == 5
    assert CLAIM.verdict([2.0, 2.0], [16.0, 16.0]) == "holds" and CLAIM.verdict([5.0, 5.0], [16.0, 16.0]) == "fails"


def test_measured_rows_are_what_json_takes():
    found = measure("nar")
    assert restored(json.loads(json.dumps(found))) == row("nar")


@torch.no_grad()
def test_the_bits_of_a_model_that_knows_nothing_are_those_of_its_vocabulary():
    system = toy("raster-ar", 32)
    for p in system.model.heads.parameters():
        p.zero_()
    canvas, condition = system.canvas({"image": torch.rand(2, 1, 32, 32) * 2 - 1})
    bits = system.model.losses(canvas, condition) / math.log(2)
    assert torch.allclose(bits, torch.full_like(bits, math.log2(system.config.vocab)), atol=1e-5)


# ---- the page --------------------------------------------------------------------------------------------------------


def picture(colour):
    file = io.BytesIO()
    Image.new("L", (40, 8), colour).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def stored():
    quality = dict.fromkeys(("accuracy", "precision", "recall", "density", "coverage", "spread", "nearest"), 0.5)

    def system(key, fd_s, forwards, **more):
        return {
            **quality, "key": key, "title": key.upper(), "fd_s": fd_s, "forwards": forwards, "tokenizer": "image-vq",
            "tokenizer_from": "zoo:image-vq", "size": "tiny", "feature_model": "a classifier", "parameters": 1000,
            "steps": 20, "batch": 32, "training_seconds": 60.0, "seconds": 0.1, "seconds_alone": 0.2, "memory": 10**8,
            "load": 1.0, "strip": picture(100), **more,
        }  # fmt: skip

    rows = [json.loads(json.dumps(dataclasses.asdict(r))) for r in ROWS]
    return {
        "budget": {"data": "glyphs", "minutes": 0.1, "seed": 0, "samples": 124, "parameters": 1000},
        "order": ["t", "f"], "pictures": [10, 5, 2], "taxonomy": rows, "machine": "m", "commit": "abc",
        "systems": {
            "t": system("t", 20.0, 64, bits_per_code=5.0, likelihood="exact"),
            "f": system("f", 30.0, 15, width=80),
        },
        "references": {"held-out pictures, drawn anew": {**quality, "fd_s": 5.0, "strip": picture(0)}},
        "films": {"t": "<svg></svg>"}, "command": "python benchmarks/image_comparison.py --minutes 0.1",
    }  # fmt: skip


def test_the_page_is_made_again_byte_for_byte_from_what_is_stored(tmp_path):
    first = report(stored(), tmp_path)
    before = [path.read_bytes() for path in first]
    again = report(json.loads(json.dumps(stored())), tmp_path / "again")
    assert [path.read_bytes() for path in again] == before
    page = before[0].decode()
    for said in ("small budget", "image-vq", "steps reached", "20 of 32", "anti-diagonals", "holds", "not measured"):
        assert said in page, said
    assert page.count("<td data-name") > 100 and "<script" not in page and all(level in page for level in LEVELS)
    assert "no system" in page and "held-out pictures, drawn anew" in page


def test_a_picture_of_nothing_is_refused(tmp_path):
    nothing = stored()
    nothing["systems"]["t"]["fd_s"] = nothing["systems"]["f"]["fd_s"] = None
    with pytest.raises(ValueError, match="no system was judged"):
        report(nothing, tmp_path)
