"""The example of the README runs and does what its comments say."""

import re
from pathlib import Path

import pytest
import torch

from seriatim.plan import OrderError

README = Path(__file__).parents[1] / "README.md"


def test_the_example_learns_and_generates(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) <= 15, f"the README promises fifteen lines, the example has {len(lines)}"
    names: dict = {}
    torch.manual_seed(0)
    exec(code[1], names)
    assert "forwards=4" in capsys.readouterr().out
    tokens = names["canvas"].value["token"]
    assert tokens.shape == (4, 16)
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    assert (tokens[:, 4:] == tokens[:, :-4]).float().mean() > 0.9, "later blocks repeat what the first one says"


def test_pictures_exist():
    for path in re.findall(r"\]\((docs/images/[^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / path).is_file(), path


def test_the_order_written_in_the_documentation_works(capsys):
    text = (README.parent / "docs" / "orders.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    names: dict = {}
    torch.manual_seed(0)
    exec(code[1], names)
    assert "forwards=5" in capsys.readouterr().out
    model, canvas = names["model"], names["canvas"]
    assert torch.isfinite(model.log_prob(canvas)).all()
    prompted = model.canvas(canvas.value, known=torch.tensor([2, 5]))  # it also goes on from what is given
    assert (model.losses(prompted) > 0).sum(1).tolist() == [7, 4]
    names["s"].generate(names["s"].Target(model), prompted, names["s"].SampleAll())
    assert prompted.done


def test_the_documentation_quotes_what_an_order_that_peeks_is_told():
    text = (README.parent / "docs" / "orders.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)
    said = re.search(r"`(this order peeks: [^`]*)`", text)
    assert code is not None and said is not None
    assert "torch.where(query, MASK, VALUE)" in code[1]
    with pytest.raises(OrderError) as error:
        exec(code[1].replace("torch.where(query, MASK, VALUE)", "torch.where(query, VALUE, VALUE)"), {})
    assert str(error.value) == " ".join(said[1].split())


def test_the_drafts_of_the_documentation_change_nothing():
    text = (README.parent / "docs" / "decoding.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    torch.manual_seed(0)
    exec(code[1], {})
