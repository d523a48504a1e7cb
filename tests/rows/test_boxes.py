"""Boxes in texts: from every form into every other and back, and what is outside or written otherwise."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vir_hf.errors import RecipeError
from vir_hf.rows.boxes import FRAMES, ORDERS, SCALES, BoxChange, BoxForm, find_boxes, is_of_other_scale, is_outside

FORMS = [BoxForm(*words) for words in itertools.product(SCALES, ORDERS, FRAMES)]


@st.composite
def boxes(draw, longest: int = 4000) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """A size and a box in whole pixels inside of it."""
    width, height = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    across = sorted((draw(st.integers(0, width)), draw(st.integers(0, width))))
    down = sorted((draw(st.integers(0, height)), draw(st.integers(0, height))))
    return (width, height), (across[0], down[0], across[1], down[1])


def corners(text: str, form: BoxForm, size: tuple[int, int]) -> tuple[float, ...]:
    (found,) = find_boxes(text, form, size)
    return found.corners


@given(boxes(), st.sampled_from(FORMS))
def test_a_box_is_there_and_back_within_half_a_step_of_the_form(drawn, form: BoxForm) -> None:
    size, box = drawn
    text = f"It is at {list(box)}."
    there, count = BoxChange(BoxForm(), form).apply(text, size)
    assert count == 1
    tolerance = 0.5 * max(form.step(size), 1e-9) + 1e-6
    assert corners(there, form, size) == pytest.approx(box, abs=tolerance)
    back, _ = BoxChange(form, BoxForm()).apply(there, size)
    if form.step(size) <= 1:  # a grid no coarser than pixels: not one is lost
        assert back == text
    else:
        assert corners(back, BoxForm(), size) == pytest.approx(box, abs=tolerance + 0.5)


@given(boxes(longest=999), st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_a_box_goes_by_way_of_any_form_within_half_a_pixel_each_time(drawn, first: BoxForm, second: BoxForm) -> None:
    size, box = drawn
    text, _ = BoxChange(BoxForm(), first).apply(str(list(box)), size)
    text, _ = BoxChange(first, second).apply(text, size)
    assert corners(text, second, size) == pytest.approx(box, abs=1.0 + 1e-6)


@given(boxes(), st.sampled_from(FORMS))
def test_a_box_inside_stays_inside_in_every_form(drawn, form: BoxForm) -> None:
    size, box = drawn
    there, _ = BoxChange(BoxForm(), form).apply(str(list(box)), size)
    (found,) = find_boxes(there, form, size)
    assert not is_outside(found, form, size)


@pytest.mark.parametrize(
    ("form", "written"),
    [  # an image of 200x100: padded to 200x200 with 50 pixels above and below; by hand
        ("pixel xyxy", "[20, 10, 60, 50]"),
        ("pixel xywh", "[20, 10, 40, 40]"),
        ("pixel cxcywh", "[40, 30, 40, 40]"),
        ("0-1 xyxy", "[0.100, 0.100, 0.300, 0.500]"),
        ("0-1000 xyxy", "[100, 100, 300, 500]"),
        ("0-999 xyxy", "[100, 100, 300, 499]"),
        ("pixel xyxy padded", "[20, 60, 60, 100]"),
        ("0-1 xyxy padded", "[0.100, 0.300, 0.300, 0.500]"),
        ("0-1000 cxcywh padded", "[200, 400, 200, 200]"),
    ],
)
def test_forms_are_what_they_say(form: str, written: str) -> None:
    text, _ = BoxChange(BoxForm(), BoxForm.of(form)).apply("[20, 10, 60, 50]", (200, 100))
    assert text == written
    assert corners(written, BoxForm.of(form), (200, 100)) == pytest.approx((20, 10, 60, 50), abs=0.2)


def test_half_a_step_is_written_in_full() -> None:
    assert BoxChange(BoxForm(), BoxForm.of("pixel cxcywh")).apply("[1, 1, 4, 4]", (10, 10))[0] == "[2.5, 2.5, 3, 3]"


def test_brackets_commas_and_the_text_around_stay() -> None:
    change = BoxChange(BoxForm(), BoxForm.of("0-1000 xywh"))
    text = "<ref>cat</ref><box>(10,20),(30,40)</box> and [10,20, 30, 40]; [1, 2], [1, 2, 3, 4, 5] and (3)"
    assert change.apply(text, (100, 100)) == (
        "<ref>cat</ref><box>(100,200),(300,400)</box> and [100,200, 200, 200]; [1, 2], [1, 2, 3, 4, 5] and (3)",
        2,
    )


def test_points_are_changed_if_asked() -> None:
    keys = {"from": "pixel", "to": "0-1000"}
    assert BoxChange.of(keys).apply("at (10, 20)", (100, 100)) == ("at (10, 20)", 0)
    assert BoxChange.of({**keys, "points": True}).apply("at (10, 20)", (100, 100)) == ("at (100, 200)", 1)


@pytest.mark.parametrize(
    ("form", "text", "outside"),
    [
        ("pixel", "[0, 0, 100, 50]", False),
        ("pixel", "[0, 0, 102, 50]", True),
        ("pixel", "[60, 0, 50, 50]", True),
        ("pixel xywh", "[60, 0, 50, 50]", True),
        ("0-1", "[0.5, 0.5, 1.0, 1.0]", False),
        ("0-1000", "[0, 0, 1000, 1000]", False),
        ("0-1000 padded", "[0, 0, 1000, 1000]", True),  # the padding is no part of the image
        ("0-1000 padded", "[0, 250, 1000, 750]", False),
    ],
)
def test_what_is_outside_of_the_image_is_seen(form: str, text: str, outside: bool) -> None:
    read = BoxForm.of(form)
    (found,) = find_boxes(text, read, (100, 50))
    assert is_outside(found, read, (100, 50)) is outside


def test_another_scale_is_seen() -> None:
    def seen(text: str, form: str) -> bool:
        (found,) = find_boxes(text, BoxForm.of(form), (100, 100))
        return is_of_other_scale(found, BoxForm.of(form))

    assert seen("[10, 20, 30, 40]", "0-1") and seen("[0.1, 0.2, 0.3, 0.4]", "pixel")
    assert not seen("[0.1, 0.2, 0.3, 1]", "0-1") and not seen("[1, 1, 1, 1]", "pixel")
    assert not seen("[2.5, 2.5, 3, 3]", "pixel cxcywh")


@pytest.mark.parametrize(
    "keys",
    [
        {"from": "pixels"},
        {"to": "pixel"},
        {"from": "pixel 0-1"},
        {"from": "xyxy"},
        {"from": "pixel", "points": 1},
        {"from": "pixel", "into": "0-1"},
    ],
)
def test_a_form_that_cannot_be_read_is_a_recipe_error(keys: dict) -> None:
    with pytest.raises(RecipeError, match=r"data\.boxes"):
        BoxChange.of(keys)
