"""Scorers against what their own repositories publish, against hand-computed cases, and by properties."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vir_hf.errors import DataError, RecipeError
from vir_hf.scores import choices, vqa
from vir_hf.scores.captions import caption
from vir_hf.scores.judging import Item
from vir_hf.scores.tasks import TASKS, asked, find_task, judge
from vir_hf.scores.words import caption_words

# https://github.com/google-research/pix2struct, metrics_test.py
PAIRS = [
    ("abc", "abc"), ("abc", "Abc"), ("Abc", "abc"), ("100%", "96%"), ("100%", "94%"), ("100%", "0.96"), ("100%", "0.94"),
    ("Don't", "Won't"),
]  # fmt: skip


def value(task: str, rows: list[tuple[str, tuple[str, ...]]], variant: str | None = None, **details: object) -> dict:
    items = [Item(str(n), f"Question {n}?", right, **details) for n, (_, right) in enumerate(rows)]  # type: ignore[arg-type]
    return judge(TASKS[task], items, [said for said, _ in rows], variant).values()


@pytest.mark.parametrize(
    ("task", "metric", "wanted"),
    [
        ("exact", "exact_match", 12.5),
        ("anls", "anls", 47.5),
        ("relaxed", "relaxed_accuracy", 62.5),
        ("caption", "cider", 128.6),
    ],
)
def test_the_vectors_of_pix2struct(task: str, metric: str, wanted: float) -> None:
    found = value(task, [(said, (right,)) for said, right in PAIRS])[metric]
    assert 100 * found == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("Yes.", "yes"),
        ("two dogs", "2 dogs"),
        ("the dog", "dog"),
        ("dont", "don't"),
        ("hed've", "he'd've"),
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black-and-white", "black and white"),
        ("3.5", "3.5"),
        ("none", "0"),
        ("it's", "it's"),
        ("a/c", "c"),
    ],
)
def test_what_the_official_vqa_code_makes_of_an_answer(said: str, wanted: str) -> None:
    assert vqa.plain_words(vqa.without_punctuation(said)) == wanted


def test_the_table_of_contractions_is_upstreams() -> None:
    assert len(vqa.CONTRACTIONS) == 114
    known = {
        "whod've": "who'd've",
        "yall'd've": "y'all'd've",
        "ow's'at": "'ow's'at",
        "thered": "there'd",
        "maam": "ma'am",
    }
    assert {key: vqa.CONTRACTIONS[key] for key in known} == known and "shes" not in vqa.CONTRACTIONS


def test_vqa_counts_people_and_leaves_each_out_in_turn() -> None:
    ten = ("red",) * 2 + ("blue",) * 8
    assert value("vqa", [("blue", ten)])["accuracy"] == pytest.approx(1.0)
    assert value("vqa", [("red", ten)])["accuracy"] == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert value("vqa", [("Red.", ("red",) * 10)])["accuracy"] == 1.0
    with pytest.raises(DataError, match="found 1 right answers, expected 10"):
        value("vqa", [("red", ("red",))])


def test_vqa_variants_differ_where_public_code_differs() -> None:
    same = ("2 dogs.",) * 10  # all the same: the official code leaves them as they are, so that nothing matches
    assert value("vqa", [("two dogs", same)])["accuracy"] == 0
    assert value("vqa", [("two dogs", same)], "vlmevalkit")["accuracy"] == 1
    words = ("two",) * 5 + ("three",) * 5  # never digits for the words of the right answers
    assert value("vqa", [("two", words)])["accuracy"] == 0
    assert value("vqa", [("two", words)], "m4c")["accuracy"] == 1
    possessive = ("dog 's bone",) * 10
    assert value("vqa", [("dog's bone", possessive)], "m4c")["accuracy"] == 1
    assert value("vqa", [("dog's bone", possessive)], "vlmevalkit")["accuracy"] == 0


@pytest.mark.parametrize(
    ("said", "llava", "lmms", "vlmevalkit"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no"),
        ("No, there is none. Yes", "no", "other", "other"),
        ("There is not a dog.", "no", "other", "other"),
        ("NO", "yes", "no", "no"),
        ("I see a dog", "yes", "other", "other"),
        ("Yes, there is no cat", "no", "other", "other"),
        ("", "other", "other", "other"),
    ],
)
def test_what_pope_takes_an_answer_for(said: str, llava: str, lmms: str, vlmevalkit: str) -> None:
    item = [Item("1", "?", ("yes",))]
    for variant, wanted in (("llava", llava), ("lmms-eval", lmms), ("vlmevalkit", vlmevalkit)):
        assert judge(TASKS["pope"], item, [said], variant).read_as == [wanted]


def test_pope_by_hand() -> None:
    said = ["Yes", "Yes", "No", "No", "yes", "maybe not"]
    right = ["yes", "no", "no", "yes", "yes", "yes"]
    found = value("pope", [(one, (label,)) for one, label in zip(said, right, strict=True)])
    # yes: 2 right, 1 wrong; 2 missed of 4
    assert found == pytest.approx({"f1": 4 / 7, "accuracy": 0.5, "precision": 2 / 3, "recall": 0.5, "yes_ratio": 0.5})
    other = value("pope", [(one, (label,)) for one, label in zip(said, right, strict=True)], "lmms-eval")
    # "maybe not" is neither: recall passes over it, and the yes ratio is that of the labels
    assert other["recall"] == pytest.approx(2 / 3) and other["yes_ratio"] == pytest.approx(4 / 6)
    with pytest.raises(DataError, match="found the label 'maybe', expected yes or no"):
        value("pope", [("yes", ("maybe",))])


OPTIONS = ("a cat", "a dog", "two birds", "nothing")


@pytest.mark.parametrize(
    ("said", "mmbench", "scienceqa", "mmstar", "letter"),
    [
        ("B", "B", "B", "B", "B"),
        ("B.", "B", "", "B", "B"),
        ("(B)", "B", "", "B", "B"),
        ("B. a dog", "B", "B", "B", ""),
        ("The answer is B.", "B", "B", "B", ""),
        ("b", "", "", "B", "B"),
        ("It is a dog", "B", "", "", ""),
        ("A dog on a table", "B", "", "A", ""),  # the article is not option A
        ("a cat or a dog", "", "", "A", ""),
        ("A or B", "", "", "A", ""),
        ("E", "", "", "", ""),
        ("Because of the light", "", "", "B", ""),
    ],
)
def test_which_letter_an_answer_names(said: str, mmbench: str, scienceqa: str, mmstar: str, letter: str) -> None:
    item = Item("1", "?", ("B",), options=OPTIONS)
    readers = (choices.read_mmbench, choices.read_scienceqa, choices.read_mmstar, choices.read_letter)
    assert [read(said, item) for read in readers] == [mmbench, scienceqa, mmstar, letter]


def rotated(name: str, right: str, said: list[str]) -> tuple[list[Item], list[str]]:
    options, place, items = ("p", "q", "r"), "ABC".index(right), []
    for turn in range(3):
        letter = "ABC"[(place - turn) % 3]
        items.append(Item(f"{name}{turn}", "?", (letter,), options=options[turn:] + options[:turn], group=name))
    return items, said


def test_circular_accuracy_wants_every_rotation_right() -> None:
    all_right, some_right, unread = (
        rotated("x", "B", ["B", "A", "C"]),
        rotated("y", "A", ["A", "C", "A"]),
        rotated("z", "A", ["A", "C", "what"]),
    )
    items = [*all_right[0], *some_right[0], *unread[0]]
    judged = judge(TASKS["mmbench"], items, [*all_right[1], *some_right[1], *unread[1]])
    assert judged.values() == pytest.approx({"circular_accuracy": 1 / 3, "accuracy": 1.0})
    assert judged.notes == ["1 answers name no option and count as wrong"]
    with pytest.raises(DataError, match="1 of 3 questions are not asked once for each of their options"):
        judge(TASKS["mmbench"], items[1:], ["A"] * 8)


def test_mmstar_averages_over_categories() -> None:
    items = [Item(str(n), "?", ("A",), category="math" if n else "logic") for n in range(4)]
    found = judge(TASKS["mmstar"], items, ["A", "B", "B", "A"]).values()
    assert found["accuracy"] == pytest.approx((1 + 1 / 3) / 2) and found["accuracy over all rows"] == 0.5


def test_mme_adds_the_share_of_images_with_both_answers_right() -> None:
    items, said = [], []
    for category, answers in (("count", ["Yes", "No", "Yes", "Yes"]), ("OCR", ["no.", "No", "yes", "No"])):
        for number, one in enumerate(answers):
            label = "Yes" if number % 2 == 0 else "No"
            items.append(Item(f"{category}{number}", "?", (label,), category=category, group=str(number // 2)))
            said.append(one)
    found = judge(TASKS["mme"], items, said).values()
    # count: 3 of 4 and 1 of 2 images; OCR: 3 of 4 and 1 of 2
    assert found["score, count"] == pytest.approx(125) and found["score, OCR"] == pytest.approx(125)
    assert found["perception (2 of 10 categories)"] == pytest.approx(250) and "cognition" not in str(found)
    with pytest.raises(DataError, match="found 1 questions, expected 2"):
        judge(TASKS["mme"], items[:3], said[:3])


def test_ocrbench_counts_answers_that_hold_the_right_one() -> None:
    items = [
        Item("1", "?", ("STOP",)),
        Item("2", "?", ("x = A",), details={"dataset": "HME100k"}),
        Item("3", "?", ("9", "nine")),
    ]
    said = ["The sign says stop.", "x=A", "Nine!"]
    assert judge(TASKS["ocrbench"], items, said).values() == {"score": 3.0, "accuracy": 1.0}
    assert judge(TASKS["ocrbench"], items, said, "lmms-eval").values()["score"] == 2.0  # no capital in any formula


def test_anls_keeps_exactly_a_half_and_divides_by_the_length_as_written() -> None:
    assert value("anls", [("ab", ("abcd",))])["anls"] == 0.5
    assert value("anls", [("a", ("abcd",))])["anls"] == 0.0
    assert value("anls", [("a  b", ("a c",))])["anls"] == pytest.approx(1 - 1 / 4)
    assert value("anls", [("a  b", ("a c",))], "vlmevalkit")["anls"] == pytest.approx(1 - 1 / 3)


def test_gqa_after_llavas_conversion() -> None:
    assert value("gqa", [("Yes.", ("yes",))])["accuracy"] == 1.0
    assert value("gqa", [("Yes.", ("yes",))], "strict")["accuracy"] == 0.0


def test_boxes_by_hand() -> None:
    found = value("grounding", [("[0.0, 0.0, 0.5, 1.0]", ("[0, 0, 1, 1]",)), ("no idea", ("[0, 0, 1, 1]",))])
    assert found == pytest.approx({"accuracy_at_0.5": 0.5, "mean_iou": 0.25})
    thousandths = value("grounding", [("(0,0),(1000,500)", ("[0, 0, 1, 0.5]",))], "thousandths")
    assert thousandths["mean_iou"] == 1.0


# What pycocoevalcap 1.2 gives, its tokenizer in Java before it, on these captions.
CAPTIONS = [
    ("A man's riding a horse on the beach.", ["A man rides a horse along the beach", "someone riding a brown horse by the sea"]),
    ("Two dogs don't play in the snow!", ["Two dogs playing in snow", "A pair of dogs (brown and white) in the snow"]),
    ("a plate of food", ["A plate with 3.5 oz. of food on it", "food on a plate"]),
]  # fmt: skip
WANTED = {
    "cider": 1.9228165275258464,
    "bleu_1": 0.7619047618684808,
    "bleu_2": 0.6172133998165273,
    "bleu_3": 0.2939407588556052,
    "bleu_4": 3.814165616124265e-05,
    "rouge_l": 0.6614738449789995,
}


def test_captions_are_scored_as_cocos_own_code_does() -> None:
    items = [Item(str(n), references=tuple(right)) for n, (_, right) in enumerate(CAPTIONS)]
    assert caption(items, [said for said, _ in CAPTIONS]).values() == pytest.approx(WANTED, rel=1e-9)


def test_words_are_cut_as_the_treebank_cuts_them() -> None:
    said = "He can't open it (yet), it's 100% o'clock-like: \"fine\" 1/2 U.S. cannot"
    wanted = "he ca n't open it -lrb- yet -rrb- it 's 100 % o'clock-like fine 1/2 u.s. can not".split()
    assert [word for word in caption_words(said) if word not in ("''",)] == wanted


def test_every_task_names_its_variants_and_keeps_the_official_first() -> None:
    assert {task.name: task.default for task in TASKS.values() if task.name in ("vqa", "pope", "textvqa", "exact")} == {
        "vqa": "official", "pope": "llava", "textvqa": "m4c", "exact": "strict",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="has no such scorer, expected one of llava, lmms-eval, vlmevalkit"):
        find_task("pope").scorer("mine")
    with pytest.raises(RecipeError, match="'popo': unknown"):
        find_task("popo")


def test_what_is_asked_is_llavas_prompt() -> None:
    item = Item("1", "Which?", ("A",), options=("cat", "dog"), details={"hint": "Look."})
    assert asked(TASKS["mmbench"], item) == (
        "Look.\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    given = Item("1", "Which?\nAnswer the question using a single word or phrase.", ("A",))
    assert asked(TASKS["vqa"], given) == given.question
    assert asked(TASKS["vqa"], given, "{question} Now.") == given.question + " Now."


TEXTS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=20)
PLAIN = ("vqa", "textvqa", "gqa", "exact", "relaxed", "anls", "ocrbench")
EMPTY = st.text(alphabet=" \t\n​", max_size=3)
RIGHT = {"pope": ("yes",), "mme": ("Yes",), "grounding": ("[0, 0, 1, 1]",)}


@pytest.mark.parametrize("task", TASKS)
@given(empty=EMPTY)
@settings(max_examples=10)
def test_an_empty_answer_never_scores(task: str, empty: str) -> None:
    right = RIGHT.get(task, ("",) * 3 + ("A",) * 7)
    options = OPTIONS if task in ("mcq", "mmbench", "scienceqa", "mmstar", "ai2d") else ()
    for variant in TASKS[task].variants:
        items = [
            Item(
                f"{n}",
                "?",
                ("A",) if options else right,
                options=options,
                category="OCR",
                group="g" if task == "mme" else "",
            )
            for n in range(2)
        ]
        judged = judge(TASKS[task], items, [empty, empty], variant)
        assert judged.scores == [0.0, 0.0]
        main = {name: score for name, score in judged.values().items() if name != "yes_ratio"}
        assert all(abs(score) < 1e-6 for score in main.values()), (variant, main)


@pytest.mark.parametrize("task", PLAIN)
@given(text=TEXTS)
@settings(max_examples=40)
def test_an_answer_that_is_the_right_one_scores_one(task: str, text: str) -> None:
    text = " ".join(text.lower().split())
    assume(text and text.strip("."))
    if task in ("vqa", "textvqa"):  # the official code compares with right answers as people gave them: plain words
        text = vqa.plain_words(vqa.without_punctuation(text))
        assume(text and vqa.plain_words(vqa.without_punctuation(text)) == text)
    if task == "gqa":
        assume(not text.endswith("."))
    variant = None
    found = value(task, [(text, (text,) * 10)], variant)
    assert next(score for name, score in found.items() if name != "score") == pytest.approx(1.0)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=12), st.randoms())
@settings(max_examples=30)
def test_the_order_of_rows_does_not_matter(rows: list[tuple[str, str]], shuffler: random.Random) -> None:
    for task in ("exact", "anls", "caption"):
        items = [Item(str(n), "?", (right,)) for n, (_, right) in enumerate(rows)]
        order = shuffler.sample(range(len(rows)), len(rows))
        one = judge(TASKS[task], items, [said for said, _ in rows]).values()
        other = judge(TASKS[task], [items[n] for n in order], [rows[n][0] for n in order]).values()
        assert one == pytest.approx(other, rel=1e-12) if task == "caption" else one == other
