"""The quickstart: true rows, fair questions, parts that load, both stages, and (slow) the real command at full size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel

from vir_hf.errors import RecipeError
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.quickstart.drawing import (
    BACKGROUND,
    COLOURS,
    KINDS,
    NUMBERS,
    PLACES,
    SHAPES,
    Thing,
    ask_about,
    converse,
    draw_blank,
    draw_scene,
    examine,
    random_scene,
    write_pictures,
)
from vir_hf.quickstart.panel import RIGHT, WRONG, Sample, draw_panel
from vir_hf.quickstart.parts import make_language_model, make_tokenizer, make_vision_tower, patch_attributes
from vir_hf.quickstart.run import (
    Size,
    choose_samples,
    commonest_answers,
    evaluate,
    questions_of,
    read_rows,
    run_quickstart,
    texts_of,
)
from vir_hf.recipe.load import load_recipe
from vir_hf.rows.encoding import encode_prompt, encode_row

NUM_QUESTIONS = 72


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_pictures(folder, num_pictures=120, num_questions=NUM_QUESTIONS, seed=3)
    return folder


def see(path: Path) -> frozenset[Thing]:
    """What stands in a picture, read from its pixels alone: nearest colour, and shape by how much of its box is filled."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    half = pixels.shape[0] // 2
    found = set()
    for number, place in enumerate(PLACES):
        row, column = divmod(number, 2)
        quarter = pixels[row * half : (row + 1) * half, column * half : (column + 1) * half]
        mask = (quarter != BACKGROUND).any(axis=-1)
        if not mask.any():
            continue
        rows, columns = np.nonzero(mask)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        filled = mask.sum() / box
        shape = "square" if filled > 0.95 else "circle" if filled > 0.65 else "triangle"
        colour = quarter[mask].mean(axis=0)
        name = min(COLOURS, key=lambda word: float(np.abs(colour - COLOURS[word]).sum()))
        found.add(Thing(shape, name, place))
    return frozenset(found)


def true_answer(question: str, things: frozenset[Thing]) -> str:
    """The answer that the pixels give, found from the question's words."""
    if question == "How many objects are there?":
        return NUMBERS[len(things) - 1]
    words = question.rstrip("?").split()
    (thing,) = (it for it in things if it.colour in words or it.place in words)
    if question.startswith("What colour"):
        return thing.colour
    return thing.shape if question.startswith("What shape") else thing.place


def test_every_answer_is_true_of_its_picture(drawn: Path) -> None:
    for name in ("finetune", "heldout"):
        for row in read_rows(drawn / f"{name}.json"):
            if row["image"] == "blank.png" or row["id"].startswith("describe"):
                continue
            things = see(drawn / "images" / row["image"])
            for question, answer in questions_of(row):
                assert answer == true_answer(question, things), (row["id"], question)


def test_every_caption_names_what_is_there(drawn: Path) -> None:
    descriptions = [row for row in read_rows(drawn / "finetune.json") if row["id"].startswith("describe")]
    assert len(descriptions) == 120
    for row in [*read_rows(drawn / "pretrain.json"), *descriptions]:
        said = [frozenset(part.split()) for part in row["conversations"][1]["value"].rstrip(".").split(", ")]
        things = see(drawn / "images" / row["image"])
        assert len(said) == len(things)
        assert set(said) == {frozenset({it.colour, it.shape, it.place}) for it in things}


def test_no_training_picture_shows_a_heldout_scene(drawn: Path) -> None:
    trained = {see(path) for path in (drawn / "images").glob("train_*.png")}
    held_out = {see(path) for path in (drawn / "images").glob("heldout_*.png")}
    assert len(held_out) == len(list((drawn / "images").glob("heldout_*.png")))
    assert not trained & held_out


def test_scenes_of_one_object_are_left_for_training() -> None:
    exam = examine(144, Random(0))
    assert sum(len(scene) == 1 for scene in exam) == 144 // len(NUMBERS)  # of the 72 there are


def test_every_answer_to_a_heldout_question_comes_equally_often(drawn: Path) -> None:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    kinds: Counter[str] = Counter()
    for row in read_rows(drawn / "heldout.json"):
        ((question, answer),) = questions_of(row)
        answers[question][answer] += 1
        kinds[row["id"].rsplit("-", 1)[-1]] += 1
    assert kinds == dict.fromkeys(KINDS, NUM_QUESTIONS)
    for question, counts in answers.items():
        assert len(set(counts.values())) == 1, question
        assert set(counts) in (set(COLOURS), set(SHAPES), set(NUMBERS), set(PLACES))


def test_a_number_of_questions_that_cannot_be_balanced_is_refused() -> None:
    with pytest.raises(ValueError, match="num_questions=100"):
        examine(100, Random(0))


def test_the_same_seed_draws_the_same_and_another_does_not(drawn: Path, tmp_path: Path) -> None:
    for seed, folder in ((3, tmp_path / "same"), (4, tmp_path / "other")):
        write_pictures(folder, num_pictures=120, num_questions=NUM_QUESTIONS, seed=seed)
        files = sorted(path.relative_to(drawn) for path in drawn.rglob("*.*"))
        is_equal = [
            (folder / name).exists() and (folder / name).read_bytes() == (drawn / name).read_bytes() for name in files
        ]
        assert all(is_equal) if seed == 3 else not any(is_equal[-3:])


def test_a_conversation_asks_about_each_object_but_never_gives_an_answer_away() -> None:
    rng = Random(1)
    for _ in range(200):
        scene = random_scene(rng.randint(1, 4), rng)
        talks = converse(scene, rng)
        for talk, allowed in zip(talks, ({"colour", "count"}, {"position", "shape"}), strict=True):
            assert len(talk) == len(set(talk)) and set(talk) <= set(ask_about(scene))
            assert {question.kind for question in talk} <= allowed
        assert sum(question.kind == "colour" for question in talks[0]) == len(scene)
        assert sum(question.kind == "position" for question in talks[1]) == len(scene)


def test_a_few_questions_have_lost_their_picture(drawn: Path) -> None:
    shown = Counter(row["image"] == "blank.png" for row in read_rows(drawn / "finetune.json"))
    assert shown == {True: 2 * 4, False: 2 * 116 + 120}  # of 120 scenes, 0, 31, 62 and 93
    assert not see(drawn / "images" / "blank.png")


def test_objects_stay_in_their_quarter_and_a_blank_picture_is_blank() -> None:
    rng = Random(2)
    for place in PLACES:
        for shape in SHAPES:
            for _ in range(50):
                pixels = np.asarray(draw_scene((Thing(shape, "red", place),), rng))
                row, column = divmod(PLACES.index(place), 2)
                outside = pixels.copy()
                outside[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = BACKGROUND
                assert (outside == BACKGROUND).all()
                assert (pixels != BACKGROUND).any()
    assert (np.asarray(draw_blank()) == BACKGROUND).all()


def make_processor(folder: Path, template: str) -> LlavaProcessor:
    rows = [*read_rows(folder / "finetune.json"), *read_rows(folder / "pretrain.json")]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return LlavaProcessor.from_components(
        make_tokenizer(texts_of(rows)), image_processor, template, patch_size=16, num_additional_image_tokens=1
    )


def words_of(text: str) -> list[str]:
    return text.lower().replace(".", " .").replace(",", " ,").split()


def test_labels_are_the_answers_and_their_ends_alone(drawn: Path) -> None:
    processor = make_processor(drawn, "auto")
    for row in read_rows(drawn / "finetune.json"):
        encoded = encode_row(row, processor)
        learned = [label for label in encoded["labels"] if label >= 0]
        assert processor.tokenizer.convert_ids_to_tokens(learned) == [
            word for _, answer in questions_of(row) for word in [*words_of(answer), "</s>"]
        ]
        assert processor.tokenizer.unk_token_id not in encoded["input_ids"]
        assert encoded["input_ids"].count(processor.image_token_id) == 16
        opening = {**row, "conversations": row["conversations"][:1]}
        prompt = encode_prompt(opening, processor)
        assert encoded["input_ids"][: len(prompt)] == prompt


def test_captions_are_learned_word_for_word(drawn: Path) -> None:
    processor = make_processor(drawn, "plain")
    for row in read_rows(drawn / "pretrain.json")[:20]:
        learned = [label for label in encode_row(row, processor)["labels"] if label >= 0]
        assert processor.tokenizer.convert_ids_to_tokens(learned) == words_of(row["conversations"][1]["value"])


def test_the_tokenizer_gives_answers_back_as_they_were(drawn: Path) -> None:
    tokenizer = make_processor(drawn, "auto").tokenizer
    for answer in (*COLOURS, *SHAPES, *NUMBERS, *PLACES):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 and tokenizer.decode(ids) == answer
    assert len(tokenizer) < 128


def test_patches_know_the_object_of_their_quarter() -> None:
    colours, shapes, places = patch_attributes([(Thing("square", "blue", "top-right"),), ()])
    blue, square = list(COLOURS).index("blue") + 1, SHAPES.index("square") + 1
    assert colours[0].view(4, 4).tolist() == [[0, 0, blue, blue]] * 2 + [[0] * 4] * 2
    assert shapes[0].view(4, 4).tolist() == [[0, 0, square, square]] * 2 + [[0] * 4] * 2
    assert places[0].view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert not colours[1].any() and not shapes[1].any()


def test_parts_are_ordinary_folders_and_the_tower_learns(drawn: Path, tmp_path: Path) -> None:
    rows = read_rows(drawn / "pretrain.json")
    scenes = [tuple(see(drawn / "images" / row["image"])) for row in rows]
    images = [drawn / "images" / row["image"] for row in rows]
    first = make_vision_tower(tmp_path / "one", images, scenes, num_steps=1, seed=0)
    later = make_vision_tower(tmp_path / "tower", images, scenes, num_steps=12, seed=0)
    assert later < 0.9 * first
    make_language_model(tmp_path / "language_model", texts_of(rows), seed=0)
    assert CLIPVisionModel.from_pretrained(tmp_path / "tower").config.patch_size == 16
    assert AutoImageProcessor.from_pretrained(tmp_path / "tower").crop_size["height"] == 64
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "language_model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "language_model")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


class FixedAnswerer:
    """Answers each question by a function of its text and its picture."""

    def __init__(self, say: Any):
        self.say = say

    def answer_batch(self, questions: list[Any], **generation: Any) -> list[str]:
        return [self.say(question.text, question.images[0]) for question in questions]


def test_scores_of_one_who_sees_and_of_one_who_guesses(drawn: Path) -> None:
    heldout, training = read_rows(drawn / "heldout.json"), read_rows(drawn / "finetune.json")
    guesses = commonest_answers(training)

    def look(question: str, picture: Any) -> str:
        return true_answer(question, see(Path(picture))) if isinstance(picture, str) else guesses[question]

    scores, samples = evaluate(FixedAnswerer(look), heldout, training, drawn / "images", seed=0)  # type: ignore[arg-type]
    chance = (1 / 6 + 1 / 3 + 1 / 4 + 1 / 4) / 4
    assert scores["heldout_accuracy"] == 1.0
    assert scores["blind_accuracy"] == scores["chance_accuracy"] == pytest.approx(chance, abs=1e-4)
    assert scores["accuracy_by_kind"] == dict.fromkeys(KINDS, 1.0)
    assert scores["num_heldout_questions"] == NUM_QUESTIONS * len(KINDS)
    assert all(sample.given == sample.answer for sample in samples) and len(samples) == 6

    half, _ = evaluate(
        FixedAnswerer(lambda text, picture: "four" if text.startswith("How") else "red"),  # type: ignore[arg-type]
        heldout, training, drawn / "images", seed=0,
    )  # fmt: skip
    assert half["accuracy_by_kind"] == {"colour": 0.1667, "shape": 0.0, "count": 0.25, "position": 0.0}


def test_the_commonest_answer_is_counted_per_question() -> None:
    def row(*rounds: str) -> dict[str, Any]:
        speakers = ("human", "gpt")
        return {"conversations": [{"from": speakers[i % 2], "value": value} for i, value in enumerate(rounds)]}

    rows = [row("<image>\nA?", "x", "B?", "y"), row("<image>\nB?", "y", "A?", "z"), row("A?", "z")]
    assert commonest_answers(rows) == {"A?": "z", "B?": "y"}


def test_samples_are_six_pictures_and_every_kind() -> None:
    paths = [f"{number // 4}.png" for number in range(40)]
    chosen = choose_samples(paths, [*KINDS] * 10, seed=5)
    assert len({paths[i] for i in chosen}) == 6
    assert {KINDS[i % 4] for i in chosen} == set(KINDS)


def test_the_panel_shows_pictures_and_marks_wrong_answers() -> None:
    blue = Image.new("RGB", (64, 64), (0, 0, 255))

    def count(sample: Sample, colour: tuple[int, int, int]) -> int:
        return int((np.asarray(draw_panel([sample] * 6)) == colour).all(axis=-1).sum())

    right, wrong = Sample(blue, "What?", "red", "red"), Sample(blue, "What?", "red", "blue")
    assert count(right, (0, 0, 255)) == 6 * 320 * 320
    assert count(right, RIGHT) > 0 and count(right, WRONG) == 0
    assert count(wrong, WRONG) > 0 and count(wrong, RIGHT) == 0


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("small_run")
    recipe = load_recipe(
        [
            "experiment=quickstart",
            f"training.output_dir={folder}",
            "training.max_steps=2",
            "training.dataloader_num_workers=0",
        ]
    )
    size = Size(num_pictures=64, num_questions=NUM_QUESTIONS, tower_steps=2, pretrain_rows=32)
    return run_quickstart(recipe, size), folder


def test_a_run_reports_what_it_measured(small_run: tuple[dict[str, Any], Path]) -> None:
    metrics, folder = small_run
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["num_steps"] == 2 and metrics["stage"] == "finetune"
    assert 0 <= metrics["heldout_accuracy"] <= 1 and 0 <= metrics["blind_accuracy"] <= 1
    assert metrics["chance_accuracy"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["pretrain"]["num_rows"] == 32
    assert Image.open(folder / "samples.png").size[0] > 900


def test_stage_one_changes_the_projector_only_and_no_stage_changes_the_tower(
    small_run: tuple[dict[str, Any], Path],
) -> None:
    _, folder = small_run
    tower = load_file(folder / "parts" / "vision_tower" / "model.safetensors")
    language_model = load_file(folder / "parts" / "language_model" / "model.safetensors")
    first, second = (load_file(path / "model.safetensors") for path in (folder / "pretrain", folder))

    def part(weights: dict[str, torch.Tensor], word: str) -> dict[str, torch.Tensor]:
        return {name: value for name, value in weights.items() if word in name}

    for weights in (first, second):
        towers = part(weights, "vision_tower.")
        assert len(towers) >= 60
        for name, value in towers.items():
            own = name.split("vision_tower.")[1].removeprefix("vision_model.")
            (original,) = (tensor for key, tensor in tower.items() if key.removeprefix("vision_model.") == own)
            assert torch.equal(value, original), name
    layers = part(first, "language_model.model.layers.")
    assert layers
    for name, value in layers.items():
        assert torch.equal(value, language_model[name.removeprefix("language_model.")]), name
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert any("layers." in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)


def test_the_saved_recipe_is_an_ordinary_one(small_run: tuple[dict[str, Any], Path]) -> None:
    _, folder = small_run
    again = load_recipe([], recipe_file=folder / "recipe.yaml")
    assert again.data.data_path == str(folder / "data" / "finetune.json")
    assert again.model.vision_tower == str(folder / "parts" / "vision_tower")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = load_recipe(["experiment=quickstart", f"training.output_dir={tmp_path}"])
    with pytest.raises(RecipeError, match="one process, found WORLD_SIZE=2"):
        run_quickstart(recipe)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_real_command_learns_to_see(tmp_path: Path) -> None:
    """At full size, as a user types it. How long it may take is a promise of the README, not of a test on a shared machine."""
    command = [sys.executable, "-m", "vir_hf.cli", "train", "experiment=quickstart", f"training.output_dir={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["heldout_accuracy"] >= 0.90
    assert abs(metrics["blind_accuracy"] - metrics["chance_accuracy"]) <= 0.05
    assert metrics["num_heldout_questions"] >= 500
    assert min(metrics["accuracy_by_kind"].values()) >= 0.80
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "recipe.yaml").is_file()
