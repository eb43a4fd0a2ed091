"""What is counted of pyramids is what their plans and caches say; and a chart of it."""

import pytest

from seriatim.backbones.mamba import MambaConfig
from seriatim.evaluation.scale_costs import SCHEDULES, counted, measured, save_scale_costs
from seriatim.systems.image import hmar, m_var, var
from seriatim.systems.pyramid_trials import costs

SCALES = (1, 2, 3, 4)


def test_pairs_and_kept_entries_are_those_of_plans():
    mixer = m_var.case(SCALES).model.backbone.config.mixer
    said = counted(SCALES, 16, mixer)
    one, other = (m.case(SCALES).plan(m.case(SCALES).sample(1)).cost() for m in (var, hmar))
    assert (said.every, said.own, said.keys) == (one.pairs, other.pairs, 2 * 16 * one.kept)
    assert m_var.case(SCALES).plan(m_var.case(SCALES).sample(1)).cost("own").pairs == said.own


def test_bytes_of_caches_are_what_is_counted():
    models = {m.META.key: m.case(SCALES).model for m in (var, hmar, m_var)}
    found = measured(models, rows=3, runs=1)
    said = counted(SCALES, 16, models["m-var"].backbone.config.mixer)
    layers, rows, size = 2, 3, 8
    assert max(found["var"].held) == layers * rows * size * said.keys and found["var"].held[-1] == 0
    assert set(found["hmar"].held) == {0}
    assert set(found["m-var"].held) == {layers * rows * size * said.state}
    assert all(len(of.seconds) == 4 and min(of.seconds) > 0 for of in found.values())


def test_keys_grow_with_pictures_and_the_state_does_not():
    mixer = MambaConfig(1024, 1, state=64)
    small, middle, large = (counted(SCHEDULES[n], 1024, mixer) for n in (256, 512, 1024))
    assert small.state == middle.state == large.state == 137_600
    assert (small.every, small.own) == (286_434, 110_468)
    assert costs(None, 0)["keys_to_state_1024"] == large.keys / large.state
    assert small.keys / small.state == pytest.approx(6.3, abs=0.05) and large.keys > 10 * small.keys


def test_a_chart_is_drawn(tmp_path):
    found = measured({"m-var": m_var.case().model, "var": var.case().model}, rows=2, runs=1)
    path = save_scale_costs(found, (1, 2), tmp_path / "scales.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
