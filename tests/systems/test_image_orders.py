"""Orders of pictures as they are watched: what is known of each by other means must come out."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from seriatim.evaluation.order_svg import order_svg
from seriatim.systems.image.raster_ar import Config, RasterAR
from seriatim.systems.image_orders import maps_of, system_of, watched
from seriatim.systems.meta import catalogue

IMAGES = [key for key, (meta, _) in catalogue().items() if meta.family == "image"]
QUICK = [key for key in IMAGES if key not in ("mar", "hi-mar")]  # a diffusion for every group takes seconds


@pytest.mark.parametrize("key", QUICK)
def test_every_element_is_decided_once_by_as_many_steps_as_are_counted(key):
    order = watched(key)
    assert order.turn.min() >= 0 and order.steps <= order.forwards
    least, most = order.groups
    assert least * order.steps <= len(order.turn) <= most * order.steps
    assert sum(len(index) for index, _ in maps_of(order)) == len(order.turn)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["mar", "hi-mar"])
def test_the_same_of_those_that_denoise_every_group(key):
    test_every_element_is_decided_once_by_as_many_steps_as_are_counted(key)


@pytest.mark.parametrize("side", [2, 4, 8])
def test_forwards_in_raster_order_grow_with_the_square_of_the_side(side):
    system = RasterAR(replace(Config(), side=side), None).eval()
    order = watched("raster-ar", system)
    assert order.forwards == side * side and order.turn.tolist() == list(range(side * side))


def test_what_is_known_of_single_orders():
    scales = system_of("var").config.tokenizer.scales
    var, nar, axial = watched("var"), watched("nar"), watched("axial-transformer")
    assert var.forwards == len(scales) and var.level == "scale" and len(maps_of(var)) == len(scales)
    assert nar.forwards == 2 * 8 - 1 and nar.level == "token"
    assert torch.equal(nar.turn, nar.coord.sum(1))  # along anti-diagonals
    assert axial.level == "pixel" and axial.likelihood == "exact" and axial.groups == (1, 1)
    assert watched("flowar").element == "vectors" and var.element == "ids"


def test_levels_are_those_of_the_survey():
    said = {key: watched(key).level for key in ("raster-ar", "vf-prompt", "flowar", "nfig", "d-ar")}
    assert said == {"raster-ar": "token", "vf-prompt": "token", "flowar": "scale", "nfig": "scale", "d-ar": "token"}


def test_text_has_no_order_of_a_picture():
    with pytest.raises(ValueError, match="systems of pictures"):
        watched("mdlm")


def test_a_drawing_has_a_square_for_every_element_which_takes_on_colour_in_turn():
    drawn = ElementTree.fromstring(order_svg([[(0, 0, 0)], [(0, 0, 1), (0, 1, 1), (1, 0, 2), (1, 1, 2)]], 3))
    times = [float(a.get("keyTimes").split(";")[1]) for rect in drawn for a in rect]
    assert len(drawn) == 5 and times == sorted(times) and len(set(times)) == 3
    with pytest.raises(ValueError, match="decides nothing"):
        order_svg([[]], 0)
