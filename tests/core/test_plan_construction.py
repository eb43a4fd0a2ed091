"""Plans whose parts do not fit together are refused where they are made, naming what differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.layout import line
from seriatim.plan import OrderError, plan_of, reads_at
from seriatim.view import inclusive


def next_token():
    return plan_of(inclusive(range(6)), range(6), [-1, *range(5)], [(i, i) for i in range(6)])


def _changed(**fields):
    return lambda: replace(next_token(), **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_changed(views={}), "a plan needs at least one view"),
        (_changed(views={"space": inclusive(range(4))}), "view 'space' has 4 slots, the plan has 6"),
        (_changed(reads=reads_at([6], [0])), "slot 6 is read, but there are only 6 slots"),
        (_changed(reads=reads_at([0], [9])), "element 9 is read, but there are only 6 elements"),
        (_changed(reads=reads_at([0, 1], [0])), "2 slots read 1 elements"),
        (_changed(rank=torch.arange(4)[None]), "element 5 is read, but there are only 4 elements"),
        (_changed(reads=reads_at([], []), rank=torch.arange(3)[None]), "element 4 is carried, but there are only 3"),
        (_changed(layers=torch.ones(2, 5, dtype=torch.bool)), "`layers` labels 5 slots, the plan has 6"),
        (_changed(layout=line(7)), "6 elements have a rank, but the layout has 7"),
        (
            lambda: _changed(slots=replace(next_token().slots, source=torch.zeros(1, 2, dtype=torch.long)))(),
            "`source` labels 2 slots, `needs` labels 6",
        ),
    ],
)
def test_plans_that_do_not_fit_together_are_refused(make, message):
    with pytest.raises(OrderError) as error:
        make()
    assert str(error.value).startswith(message)
