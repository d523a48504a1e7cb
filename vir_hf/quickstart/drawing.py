"""Pictures of coloured shapes and LLaVA rows about them, the same for the same seed on every machine."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from vir_hf.files import write_json

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 205, 30),
    "purple": (140, 60, 180),
    "orange": (245, 135, 30),
}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("one", "two", "three", "four")
KINDS = ("colour", "shape", "count", "position")
PICTURE_SIZE = 64
BACKGROUND = (236, 236, 236)
BLANK_EVERY = 31  # shares no factor with the four sizes of scenes, which take turns


@dataclass(frozen=True)
class Thing:
    """One object of a picture: its shape, its colour and the quarter of the picture it stands in."""

    shape: str
    colour: str
    place: str


@dataclass(frozen=True)
class Question:
    """One question about a picture and its only right answer; `kind` is one of `KINDS`."""

    kind: str
    text: str
    answer: str


Scene = tuple[Thing, ...]


def draw_scene(scene: Scene, rng: random.Random, size: int = PICTURE_SIZE) -> Image.Image:
    """Return the picture of a scene; `rng` moves, resizes and tints every object a little. An empty scene is blank."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    pen = ImageDraw.Draw(image)
    quarter = size // 2
    for thing in scene:
        width = rng.randint(quarter * 9 // 16, quarter * 13 // 16)
        row, column = divmod(PLACES.index(thing.place), 2)
        left = column * quarter + rng.randint(1, quarter - width - 1)
        top = row * quarter + rng.randint(1, quarter - width - 1)
        right, bottom = left + width, top + width
        red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[thing.colour])
        if thing.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=(red, green, blue))
        elif thing.shape == "square":
            pen.rectangle((left, top, right, bottom), fill=(red, green, blue))
        else:
            pen.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill=(red, green, blue))
    return image


def draw_blank(size: int = PICTURE_SIZE) -> Image.Image:
    """Return the picture without any object, which shows what can be guessed from a question alone."""
    return Image.new("RGB", (size, size), BACKGROUND)


def random_scene(num_things: int, rng: random.Random) -> Scene:
    """Return a scene of one to four objects in different quarters and of different colours, so no question is vague."""
    places = sorted(rng.sample(range(len(PLACES)), num_things))
    colours = rng.sample(list(COLOURS), num_things)
    return tuple(
        Thing(rng.choice(SHAPES), colour, PLACES[place]) for place, colour in zip(places, colours, strict=True)
    )


def describe_scene(scene: Scene, rng: random.Random) -> str:
    """Return the caption of a scene, such as "red top-left circle, bottom-right blue square.", in any order.

    After reading order alone, a place would be told by the places before it, without a look. And colour and place change
    sides, so that each is said right after the other: the shortest way to learn which belongs to which. With one fixed order
    the model needs three times the steps.
    """
    parts = []
    for it in rng.sample(scene, len(scene)):
        first, second = rng.sample((it.colour, it.place), 2)
        words = rng.choice([(first, it.shape, second), (first, second, it.shape)])
        parts.append(" ".join(words))
    return ", ".join(parts) + "."


def ask_about(scene: Scene) -> list[Question]:
    """Return every question that a scene answers, grouped by kind in the order of `KINDS`."""
    return [
        *(Question("colour", f"What colour is the object at the {it.place}?", it.colour) for it in scene),
        *(Question("shape", f"What shape is the {it.colour} object?", it.shape) for it in scene),
        Question("count", "How many objects are there?", NUMBERS[len(scene) - 1]),
        *(Question("position", f"Where is the {it.colour} object?", it.place) for it in scene),
    ]


def write_pictures(folder: Path, *, num_pictures: int, num_questions: int, seed: int) -> list[Scene]:
    """Return the training scenes, in file order, after writing all pictures and their LLaVA rows into an empty `folder`.

    `images/` holds the pictures, `pretrain.json` a caption for each, `finetune.json` a description and two conversations
    each, and `heldout.json` one question a row about pictures whose scenes no training picture shows.

    Args:
        num_questions: held-out questions of each kind, a multiple of 72, so that all answers can come equally often.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    heldout = examine(num_questions, rng)
    scenes: list[Scene] = []
    while len(scenes) < num_pictures:
        scene = random_scene(len(scenes) % len(NUMBERS) + 1, rng)
        if scene not in heldout:
            scenes.append(scene)

    captions, conversations, tests = [], [], []
    blank = _save(draw_blank(), folder, "blank.png")
    for number, scene in enumerate(scenes):
        image = _save(draw_scene(scene, rng), folder, f"train_{number:05d}.png")
        caption = describe_scene(scene, rng)
        captions.append(_to_llava_row(f"caption-{number:05d}", image, [Question("caption", "", caption)]))
        description = Question("caption", "Describe the picture.", caption)
        conversations.append(_to_llava_row(f"describe-{number:05d}", image, [description]))
        # A few questions lose their picture, so that a blank one means "guess" and is not something never seen.
        shown = blank if number % BLANK_EVERY == 0 else image
        for name, talk in zip("ab", converse(scene, rng), strict=True):
            conversations.append(_to_llava_row(f"talk-{number:05d}{name}", shown, talk))
    for number, (scene, questions) in enumerate(heldout.items()):
        image = _save(draw_scene(scene, rng), folder, f"heldout_{number:05d}.png")
        for question in questions:
            tests.append(_to_llava_row(f"heldout-{number:05d}-{question.kind}", image, [question]))
    for name, rows in (("pretrain", captions), ("finetune", conversations), ("heldout", tests)):
        write_json(folder / f"{name}.json", rows, indent=1, ensure_ascii=True)
    return scenes


def converse(scene: Scene, rng: random.Random) -> tuple[list[Question], list[Question]]:
    """Return the questions of two training rows: one asks for colours by place, the other for places and shapes by colour.

    Two rows, because in one conversation each answer would give the other away without a look at the picture.
    """
    by_kind = {kind: [question for question in ask_about(scene) if question.kind == kind] for kind in KINDS}
    by_place = by_kind["colour"] + [question for question in by_kind["count"] if rng.random() < 0.5]
    by_colour = by_kind["position"] + by_kind["shape"]
    rng.shuffle(by_place)
    rng.shuffle(by_colour)
    return by_place, by_colour


def examine(num_questions: int, rng: random.Random) -> dict[Scene, list[Question]]:
    """Return held-out scenes and at most one question of each kind about each of them.

    Every question is asked equally often with every possible answer, so the question alone is worth nothing.
    """
    num_cells = {
        "colour": len(PLACES) * len(COLOURS),
        "shape": len(COLOURS) * len(SHAPES),
        "count": len(NUMBERS),
        "position": len(COLOURS) * len(PLACES),
    }
    quota = {kind: num_questions // num for kind, num in num_cells.items()}
    if any(quota[kind] * num_cells[kind] != num_questions for kind in KINDS):
        raise ValueError(f"num_questions={num_questions}: expected a multiple of every number in {num_cells}")
    asked: Counter[Question] = Counter()
    exam: dict[Scene, list[Question]] = {}
    while asked.total() < num_questions * len(KINDS):
        scene = random_scene(rng.randint(1, len(NUMBERS)), rng)
        if scene in exam:
            continue
        open_questions = [question for question in ask_about(scene) if asked[question] < quota[question.kind]]
        rng.shuffle(open_questions)
        chosen = {question.kind: question for question in open_questions}
        if len(scene) == 1 and "count" not in chosen:
            continue  # there are few such scenes, and training needs some
        if chosen:
            exam[scene] = [chosen[kind] for kind in KINDS if kind in chosen]
            asked.update(exam[scene])
    return exam


def _save(image: Image.Image, folder: Path, name: str) -> str:
    image.save(folder / "images" / name, compress_level=1)
    return name


def _to_llava_row(row_id: str, image: str, questions: list[Question]) -> dict[str, object]:
    """Return one row of LLaVA's own format, with the picture before the first question."""
    turns = []
    for number, question in enumerate(questions):
        text = f"<image>\n{question.text}".strip() if number == 0 else question.text
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return {"id": row_id, "image": image, "conversations": turns}
