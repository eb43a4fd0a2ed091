"""Layouts number elements through typed segments; canvases change by edits only, and given elements never."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seriatim.canvas import (
    DECIDED,
    DELETED,
    GIVEN,
    GUESSED,
    UNKNOWN,
    Canvas,
    Delete,
    EditError,
    Grow,
    Insert,
    Revise,
    Set,
    Truncate,
    Unset,
)
from seriatim.layout import Layout, Segment, grid, line, pyramid

# ---- layouts --------------------------------------------------------------------------------------------------------


def place(*rows: int) -> torch.Tensor:
    return torch.tensor(rows)[:, None]


def scene() -> Layout:
    """Text, an image, more text."""
    return line(2, "text").then(grid(2, 2, kind="image")).then(line(1, "text", start=2))


def test_elements_are_numbered_through_all_segments():
    layout = scene()
    assert layout.size == 7
    assert layout.kinds == ("text", "image")
    assert layout.kind.tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert layout.elements("text").tolist() == [0, 1, 6]
    assert layout.elements("image").tolist() == [2, 3, 4, 5]
    assert (layout.count("text"), layout.count("image")) == (3, 4)


def test_an_element_has_a_column_among_the_values_of_its_kind():
    assert scene().index.tolist() == [0, 1, 0, 1, 2, 3, 2]


def test_coordinates_of_kinds_with_fewer_axes_are_padded():
    assert scene().coord.tolist() == [[0, 0], [1, 0], [0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]


def test_a_pyramid_goes_from_coarse_to_fine_in_raster_order():
    layout = pyramid((1, 2))
    assert layout.coord.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]


def test_a_grid_may_have_any_number_of_axes():
    assert grid(3).coord.tolist() == [[0], [1], [2]]
    assert grid(2, 3, 4).coord[-1].tolist() == [1, 2, 3]


def test_given_segments_mark_their_elements():
    layout = line(2, "prompt", given=True).then(line(3))
    assert layout.given.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("says_so", ["action", "ids", "both"])
def test_the_same_datum_in_two_forms_has_one_number_whoever_says_so(says_so):
    names = {"action": ("ids", None), "ids": (None, "action"), "both": ("ids", "action")}[says_so]
    action, ids = Segment("action", place(0), same_as=names[0]), Segment("ids", place(0, 1), same_as=names[1])
    datum = Layout((Segment("frame", place(0)), action, ids, Segment("reward", place(0)))).datum.tolist()
    assert datum[1] == datum[2] == datum[3]
    assert len(set(datum)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segment("text", torch.arange(3)), "coord must be an integer tensor"),
        (lambda: Segment("text", torch.zeros(3, 1)), "coord must be an integer tensor"),
        (lambda: line(-1), "a line needs a length of at least 0, got -1"),
        (lambda: grid(), "a grid needs positive sizes"),
        (lambda: grid(2, 0), "a grid needs positive sizes"),
        (lambda: pyramid(()), "a pyramid needs positive scales"),
        (lambda: Layout((Segment("ids", place(0), same_as="action"),)).datum, "which is not in"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_asking_for_a_kind_that_is_not_there_names_those_that_are():
    with pytest.raises(KeyError, match="this layout has text, image"):
        scene().elements("audio")


# ---- a new canvas ---------------------------------------------------------------------------------------------------


def tokens(*rows: list[int]) -> dict[str, torch.Tensor]:
    return {"token": torch.tensor(rows)}


def blank(rows: int, length: int, known: int | torch.Tensor = 0, **more) -> Canvas:
    return Canvas(line(length), {"token": torch.zeros(rows, length, dtype=torch.long)}, known, **more)


def written_out(canvas: Canvas) -> Canvas:
    """The same canvas without the shortcut for rows that are prefixes: an edit that changes nothing."""
    return canvas.apply([Delete(torch.full((canvas.batch, 1), -1))])


def state(canvas: Canvas) -> dict:
    """Everything that can be read from a canvas."""
    names = ("status", "rank", "place", "known", "row")
    fields = {name: getattr(canvas, name).tolist() for name in names}
    values = {kind: value.tolist() for kind, value in canvas.value.items()}
    return {**fields, **values, "done": canvas.done, "lengths": canvas.lengths().tolist()}


def test_known_elements_are_given_and_the_others_ranked_one_by_one():
    canvas = blank(2, 4, known=1)
    assert canvas.status.tolist() == [[GIVEN, UNKNOWN, UNKNOWN, UNKNOWN]] * 2
    assert canvas.rank.tolist() == [[-1, 0, 1, 2]] * 2
    assert canvas.length == canvas.given_length == 1


def test_any_elements_may_be_known_in_each_row():
    canvas = blank(2, 3, known=torch.tensor([[True, False, True], [False, False, False]]))
    assert canvas.status.tolist() == [[GIVEN, UNKNOWN, GIVEN], [UNKNOWN] * 3]
    assert canvas.rank.tolist() == [[-1, 0, -1], [0, 1, 2]]
    assert canvas.length is None


def test_the_order_may_be_stated():
    canvas = blank(1, 3, known=1, rank=torch.tensor([[5, 1, 0]]))
    assert canvas.rank.tolist() == [[-1, 1, 0]]


def test_given_segments_are_given():
    layout = line(1, "prompt", given=True).then(line(2))
    canvas = Canvas(layout, {"prompt": torch.ones(1, 1), "token": torch.zeros(1, 2)})
    assert canvas.status.tolist() == [[GIVEN, UNKNOWN, UNKNOWN]]
    assert canvas.rank.tolist() == [[-1, 0, 1]]


@pytest.mark.parametrize("known", range(4))
def test_the_short_form_for_prefixes_says_the_same_as_the_long_one(known):
    short, marked = blank(2, 3, known), blank(2, 3, torch.arange(3) < known)
    assert short.length == known and marked.length is None
    assert state(short) == state(marked) == state(written_out(blank(2, 3, known)))


def test_a_canvas_does_not_write_into_the_tensors_it_was_made_of():
    value = torch.zeros(1, 3, dtype=torch.long)
    Canvas(line(3), {"token": value}).apply([Set(torch.tensor([[7, 7]]))])
    assert value.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blank(1, 3, known=4), "the layout has 3"),
        (lambda: Canvas(line(3), {}), "a canvas needs the values of at least one kind"),
        (lambda: Canvas(line(3), {"token": torch.zeros(0, 3)}), "the batch is empty"),
        (lambda: Canvas(line(3), {"pixel": torch.zeros(1, 3)}), "no values for kind 'token'; got pixel"),
        (
            lambda: Canvas(line(3), {"token": torch.zeros(1, 4)}),
            r"values of 'token' must be \(1, 3, ...\), got \(1, 4\)",
        ),
        (lambda: Canvas(line(2), {"token": torch.tensor([[0.0, torch.nan]])}), "NaN or infinity"),
        (lambda: Canvas(line(2), {"token": torch.tensor([[0.0, torch.inf]])}), "NaN or infinity"),
    ],
)
def test_values_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- set, unset, revise ---------------------------------------------------------------------------------------------


def test_the_next_elements_of_every_row():
    canvas = blank(2, 4, known=1).apply([Set(torch.tensor([[5, 6], [7, 8]]))])
    assert canvas.value["token"].tolist() == [[0, 5, 6, 0], [0, 7, 8, 0]]
    assert canvas.status.tolist() == [[GIVEN, DECIDED, DECIDED, UNKNOWN]] * 2
    assert (canvas.length, canvas.given_length, canvas.done) == (3, 1, False)


def test_the_last_elements_may_be_fewer_than_were_drafted():
    canvas = blank(1, 3).apply([Set(torch.tensor([[1, 2, 3, 4]]))])
    assert canvas.value["token"].tolist() == [[1, 2, 3]] and canvas.done


def test_rows_may_set_different_numbers_of_elements():
    edit = Set(torch.tensor([[5, 6], [7, 0]]), torch.tensor([[3, 0], [1, -1]]))
    canvas = blank(2, 4).apply([edit])
    assert canvas.value["token"].tolist() == [[6, 0, 0, 5], [0, 7, 0, 0]]
    assert canvas.known.tolist() == [[True, False, False, True], [False, True, False, False]]
    assert canvas.lengths().tolist() == [1, 0]


def test_each_kind_is_set_in_its_own_values():
    canvas = Canvas(scene(), {"text": torch.zeros(1, 3, dtype=torch.long), "image": torch.zeros(1, 4, 2)})
    canvas.apply([Set(torch.ones(1, 2, 2), torch.tensor([[2, 5]])), Set(torch.tensor([[9]]), torch.tensor([[6]]))])
    assert canvas.value["image"][0, :, 0].tolist() == [1, 0, 0, 1]
    assert canvas.value["text"].tolist() == [[0, 0, 9]]


def test_unset_makes_unknown_again_and_leaves_the_rest():
    canvas = blank(1, 3).apply([Set(torch.tensor([[1, 2, 3]])), Unset(torch.tensor([[1, -1]]))])
    assert canvas.status.tolist() == [[DECIDED, UNKNOWN, DECIDED]]
    assert not canvas.done


def test_revise_changes_noise_but_decides_nothing():
    canvas = Canvas(line(3), {"token": torch.zeros(2, 3, 2)})
    edit = Revise(torch.tensor([[0, 2], [1, -1]]), torch.ones(2, 2, 2), level=torch.full((2, 2), 0.5))
    canvas.apply([edit])
    assert canvas.status.tolist() == [[GUESSED, UNKNOWN, GUESSED], [UNKNOWN, GUESSED, UNKNOWN]]
    assert canvas.noise["token"][..., 0].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert canvas.level.tolist() == [[0.5, 0, 0.5], [0, 0.5, 0]]
    assert not canvas.value["token"].any() and not canvas.done


def test_the_noise_of_one_kind_leaves_the_other_kinds_alone():
    canvas = Canvas(scene(), {"text": torch.zeros(1, 3, dtype=torch.long), "image": torch.zeros(1, 4, 2)})
    canvas.apply([Revise(torch.tensor([[3]]), torch.ones(1, 1, 2))])
    assert set(canvas.noise) == {"image"}


# ---- insert, delete, truncate, grow ---------------------------------------------------------------------------------


def letters(canvas: Canvas) -> list[str]:
    """The text of each row, as letters."""
    return ["".join(chr(v) for v in row.tolist()) for row in canvas.read("token")]


def text(*rows: str, known: int = 0) -> Canvas:
    """A canvas of decided letters; the first `known` are given."""
    value = torch.tensor([[ord(c) for c in row] for row in rows])
    return Canvas(line(len(rows[0])), {"token": value}, known).apply([Set(value[:, known:])])


def insert(*edits: tuple[int, str]) -> Insert:
    return Insert(torch.tensor([a for a, _ in edits]), torch.tensor([ord(c) for _, c in edits]))


def test_insertion_moves_places_and_not_numbers():
    canvas = text("ac", "xz").apply([insert((0, "b"), (-1, "w"))])
    assert letters(canvas) == ["abc", "wxz"]
    assert canvas.place.tolist() == [[0, 2, 1], [1, 2, 0]]
    assert canvas.value["token"].tolist()[0] == [ord("a"), ord("c"), ord("b")]


def test_a_row_without_insertion_keeps_its_text():
    canvas = text("ac", "xz").apply([insert((1, "d"), (-2, "?"))])
    assert letters(canvas) == ["acd", "xz"]
    assert canvas.status[1].tolist() == [DECIDED, DECIDED, DELETED]
    assert canvas.place[1].tolist() == [0, 1, 2]


def test_several_insertions_at_once_stand_as_if_made_one_after_another():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        after = torch.randint(-2, 4, (3, 4), generator=g)
        value = torch.randint(97, 123, (3, 4), generator=g)
        together, single = (text("ABCD", "EFGH", "IJKL").apply([Delete(torch.tensor([[1], [-1], [3]]))]) for _ in "ab")
        after = torch.where(after == torch.tensor([[1], [-3], [3]]), -1, after)  # behind what is still there
        together.apply([Insert(after, value)])
        for n in reversed(range(4)):  # the last first: what comes behind the same element later stands nearer to it
            single.apply([Insert(after[:, n], value[:, n])])
        assert letters(together) == letters(single)
        assert together.place.sort(1).values.tolist() == [list(range(8))] * 3
        assert (together.status[:, 4:] == DECIDED).tolist() == (after > -2).tolist()
        assert together.rank[:, 4:].tolist() == [[4] * 4] * 3  # decided together


def test_insertions_behind_given_elements_and_behind_insertions():
    canvas = text("ad", known=1).apply([insert((0, "c")), insert((0, "b"))])
    assert letters(canvas) == ["abcd"]
    assert canvas.rank.tolist() == [[-1, 0, 1, 2]]  # decided one after another, in the order of insertion


def test_deleted_elements_are_not_read_and_do_not_come_back():
    canvas = text("abc").apply([Delete(torch.tensor([[1]]))])
    assert letters(canvas) == ["ac"] and canvas.done
    for edit in (Set(torch.tensor([[0]]), torch.tensor([[1]])), Unset(torch.tensor([[1]]))):
        with pytest.raises(EditError, match="element 1 of row 0 is deleted and cannot be"):
            canvas.apply([edit])


def test_truncate_ends_rows_at_lengths_of_their_own():
    canvas = text("abcd", "wxyz").apply([Truncate(torch.tensor([1, 3]))])
    assert letters(canvas) == ["a", "wxy"]
    assert canvas.lengths().tolist() == [1, 3]
    assert canvas.done


def test_truncate_counts_what_is_there_and_in_reading_order():
    """Not places: deleted elements do not count; nor numbers: inserted ones stand where they are read."""
    canvas = text("abcd").apply([Delete(torch.tensor([[1]])), insert((0, "B")), Truncate(torch.tensor([3]))])
    assert letters(canvas) == ["aBc"]


def test_truncate_ends_what_is_not_yet_decided():
    canvas = blank(1, 4).apply([Set(torch.tensor([[1, 2]])), Truncate(torch.tensor([2]))])
    assert canvas.done


def test_growing_adds_unknown_elements_behind():
    canvas = text("ab", known=1).apply([Grow(Segment("token", place(2, 3)))])
    assert canvas.layout.size == 4 and canvas.layout.coord.tolist() == [[0], [1], [2], [3]]
    assert canvas.status.tolist() == [[GIVEN, DECIDED, UNKNOWN, UNKNOWN]]
    assert canvas.rank.tolist() == [[-1, 0, 1, 2]]
    canvas.apply([Set(torch.tensor([[ord("c"), ord("d")]]), torch.tensor([[2, 3]]))])
    assert letters(canvas) == ["abcd"]


def test_growing_one_of_several_kinds():
    canvas = Canvas(scene(), {"text": torch.zeros(1, 3, dtype=torch.long), "image": torch.zeros(1, 4, 2)})
    canvas.apply([Grow(Segment("image", torch.tensor([[2, 0]])))])
    canvas.apply([Set(torch.ones(1, 1, 2), torch.tensor([[7]]))])
    assert canvas.value["image"].shape == (1, 5, 2) and canvas.value["image"][0, 4].tolist() == [1, 1]
    assert canvas.value["text"].shape == (1, 3)


def test_noise_and_levels_grow_along():
    canvas = Canvas(line(1), {"token": torch.zeros(1, 1, 2)})
    canvas.apply([Revise(torch.tensor([[0]]), torch.ones(1, 1, 2), torch.ones(1, 1)), Grow(Segment("token", place(1)))])
    canvas.apply([Revise(torch.tensor([[1]]), torch.ones(1, 1, 2), torch.full((1, 1), 0.5))])
    assert canvas.level.tolist() == [[1, 0.5]]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Set(torch.tensor([[0], [0]]), torch.tensor([[1], [0]])), "element 0 of row 1 is given and cannot be set"),
        (Unset(torch.tensor([[0], [-1]])), "element 0 of row 0 is given and cannot be unset"),
        (Revise(torch.tensor([[0], [2]]), torch.ones(2, 1)), "element 0 of row 0 is given and cannot be revised"),
        (Delete(torch.tensor([[2], [0]])), "element 0 of row 1 is given and cannot be deleted"),
        (Truncate(torch.tensor([2, 0])), "a given element cannot be cut off"),
        (Set(torch.tensor([[0]]), torch.tensor([[1]])), r"\(1, 1\)"),
        (Set(torch.tensor([[0], [0]]), torch.tensor([[1], [4]])), "element 4 cannot be set"),
        (Grow(Segment("image", place(0))), "no values for kind 'image'; this canvas holds token"),
    ],
    ids=["set", "unset", "revise", "delete", "truncate", "rows", "number", "kind"],
)
def test_edits_that_are_refused_change_nothing(edit, message):
    canvas = written_out(blank(2, 4, known=1))
    before = state(canvas)
    with pytest.raises(EditError, match=message):
        canvas.apply([edit])
    assert state(canvas) == before


def test_the_next_elements_are_undefined_once_rows_differ():
    canvas = blank(2, 3).apply([Set(torch.tensor([[1], [1]]), torch.tensor([[0], [-1]]))])
    with pytest.raises(EditError, match="name the elements to set"):
        canvas.apply([Set(torch.tensor([[1], [1]]))])


def test_one_edit_sets_one_kind():
    canvas = Canvas(scene(), {"text": torch.zeros(1, 3), "image": torch.zeros(1, 4)})
    with pytest.raises(EditError, match="one edit holds one kind of element, got text, image"):
        canvas.apply([Set(torch.ones(1, 2), torch.tensor([[1, 2]]))])


def test_the_next_elements_are_undefined_with_several_kinds():
    canvas = Canvas(scene(), {"text": torch.zeros(1, 3), "image": torch.zeros(1, 4)})
    with pytest.raises(EditError, match="several kinds"):
        canvas.apply([Set(torch.ones(1, 1))])


# ---- the short form for prefixes ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30, derandomize=True)
@given(known=st.integers(0, 3), counts=st.lists(st.integers(1, 3), max_size=4), break_at=st.integers(0, 4))
def test_prefixes_written_in_the_short_form_equal_those_that_name_their_elements(known, counts, break_at):
    """Whatever is appended, and wherever the short form ends."""
    short, named = blank(2, 6, known), written_out(blank(2, 6, known))
    now = known
    for i, n in enumerate(counts):
        n = min(n, 6 - now)
        value, element = torch.full((2, n), i + 1), torch.arange(now, now + n).expand(2, -1)
        if i == break_at:
            written_out(short)
        short.apply([Set(value) if short.length is not None else Set(value, element)])
        named.apply([Set(value, element)])
        now += n
        assert state(short) == state(named)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", [True, False])
def test_selected_rows_are_copies_that_remember_which_sample_they_are(short):
    canvas = blank(3, 2).apply([Set(torch.tensor([[1], [2], [3]]))])
    canvas = canvas if short else written_out(canvas)
    chosen = canvas.select(torch.tensor([2, 0, 2]))
    assert chosen.row.tolist() == [2, 0, 2]
    assert chosen.value["token"][:, 0].tolist() == [3, 1, 3]
    assert chosen.length == (1 if short else None)
    chosen.apply([Set(torch.tensor([[9], [9], [9]]), torch.tensor([[1], [1], [1]]))])
    assert canvas.value["token"][:, 1].tolist() == [0, 0, 0] and canvas.status[0].tolist() == [DECIDED, UNKNOWN]


def test_noise_levels_and_places_follow_their_rows():
    canvas = Canvas(line(2), {"token": torch.zeros(2, 2)})
    level = torch.tensor([[0.25], [0.75]])
    canvas.apply([Revise(torch.tensor([[0], [0]]), level, level), Insert(torch.tensor([-1, 1]), torch.zeros(2))])
    swapped = canvas.select(torch.tensor([1, 0]))
    assert swapped.level[:, 0].tolist() == [0.75, 0.25]
    assert swapped.noise["token"][:, 0].tolist() == [0.75, 0.25]
    assert swapped.place.tolist() == canvas.place.flip(0).tolist()


def test_rows_are_admitted_where_they_are_asked_for():
    """A sample ends, another takes its row: values, noise, order and identity are those of the new one."""
    old = blank(2, 3, known=1).apply([Set(torch.tensor([[4], [5]]))])
    new = blank(1, 3, known=2, row=torch.tensor([7])).apply([Revise(torch.tensor([[2]]), torch.ones(1, 1))])
    both = old.select(torch.tensor([1, -1]), new)
    assert both.row.tolist() == [1, 7]
    assert both.value["token"].tolist() == [[0, 5, 0], [0, 0, 0]]
    assert both.status.tolist() == [[GIVEN, DECIDED, UNKNOWN], [GIVEN, GIVEN, GUESSED]]
    assert both.rank.tolist() == [[-1, 0, 1], [-1, -1, 0]]
    assert both.noise["token"].tolist() == [[0, 0, 0], [0, 0, 1]]


def test_rows_that_are_missing_or_do_not_fit_are_not_admitted():
    canvas = blank(2, 3)
    with pytest.raises(ValueError, match=r"1 rows \(-1\) are to be admitted, 0 stand ready"):
        canvas.select(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="rows of a layout of 4 elements"):
        canvas.select(torch.tensor([-1]), blank(1, 4))
    with pytest.raises(ValueError, match="cannot be selected of 2"):
        canvas.select(torch.tensor([2]))


def test_whoever_holds_a_canvas_follows_what_it_becomes():
    canvas = text("ab", "cd")
    held = canvas
    canvas.become(canvas.select(torch.tensor([1])))
    assert letters(held) == ["cd"] and held.row.tolist() == [1]


def test_rows_of_a_copy_lead_a_life_of_their_own():
    canvas = text("ab")
    copy = canvas.copy().apply([Delete(torch.tensor([[0]]))])
    assert (letters(canvas), letters(copy)) == (["ab"], ["b"])
