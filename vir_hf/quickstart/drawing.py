"""Pictures of coloured shapes and LLaVA rows about them, the same for the same seed on every machine."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 205, 30),
    "purple": (140, 60, 180),
    "orange": (245, 135, 30),
}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
KINDS = ("colour", "shape", "count", "position")
PICTURE_SIZE = 64
BACKGROUND = (236, 236, 236)


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


def describe_scene(scene: Scene) -> str:
    """Return the caption of a scene, every object with colour, shape and place in reading order."""
    articles = ["an" if thing.colour[0] in "aeiou" else "a" for thing in scene]
    parts = [f"{a} {it.colour} {it.shape} at the {it.place}" for a, it in zip(articles, scene, strict=True)]
    return " and ".join(parts).capitalize() + "."


def ask_about(scene: Scene) -> list[Question]:
    """Return every question that a scene answers, grouped by kind in the order of `KINDS`."""
    return [
        *(Question("colour", f"What colour is the object at the {it.place}?", it.colour) for it in scene),
        *(Question("shape", f"What shape is the {it.colour} object?", it.shape) for it in scene),
        Question("count", "How many objects are there?", NUMBERS[len(scene) - 1]),
        *(Question("position", f"Where is the {it.colour} object?", it.place) for it in scene),
    ]


def write_pictures(folder: Path, *, num_pictures: int, num_heldout: int, seed: int) -> list[Scene]:
    """Return the training scenes, in file order, after writing all pictures and their LLaVA rows under `folder`.

    `images/` holds the pictures, `pretrain.json` a caption for each, `finetune.json` a conversation for each, and
    `heldout.json` one question a row about pictures whose scenes no training picture shows.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    heldout: dict[Scene, None] = {}
    while len(heldout) < num_heldout:
        heldout[random_scene(len(heldout) % len(NUMBERS) + 1, rng)] = None
    scenes: list[Scene] = []
    while len(scenes) < num_pictures:
        scene = random_scene(len(scenes) % len(NUMBERS) + 1, rng)
        if scene not in heldout:
            scenes.append(scene)

    captions, conversations = [], []
    for number, scene in enumerate(scenes):
        name = f"train_{number:05d}.png"
        draw_scene(scene, rng).save(folder / "images" / name, compress_level=1)
        caption = [Question("caption", "", describe_scene(scene))]
        captions.append(_to_llava_row(f"caption-{number:05d}", name, caption))
        conversations.append(_to_llava_row(f"talk-{number:05d}", name, _converse(scene, rng)))
    _write_json(folder / "pretrain.json", captions)
    _write_json(folder / "finetune.json", conversations)

    tests, asked = [], Counter[Question]()
    for number, scene in enumerate(heldout):
        name = f"heldout_{number:05d}.png"
        draw_scene(scene, rng).save(folder / "images" / name, compress_level=1)
        for question in _examine(scene, asked, rng):
            tests.append(_to_llava_row(f"heldout-{number:05d}-{question.kind}", name, [question]))
    _write_json(folder / "heldout.json", tests)
    return scenes


def _converse(scene: Scene, rng: random.Random) -> list[Question]:
    """Return the questions of one training row: how many, and for every object its shape and its colour or its place.

    Never both colour and place of one object: each would give the other away without a look at the picture.
    """
    by_kind = {kind: [question for question in ask_about(scene) if question.kind == kind] for kind in KINDS}
    talk = by_kind["count"] + by_kind["shape"]
    talk += [rng.choice(pair) for pair in zip(by_kind["colour"], by_kind["position"], strict=True)]
    rng.shuffle(talk)
    return talk


def _examine(scene: Scene, asked: Counter[Question], rng: random.Random) -> Iterator[Question]:
    """Yield one question of each kind, each time the one asked least so far, so that no answer is the better guess."""
    for kind in KINDS:
        candidates = [question for question in ask_about(scene) if question.kind == kind]
        rng.shuffle(candidates)
        question = min(candidates, key=lambda candidate: asked[candidate])
        asked[question] += 1
        yield question


def _to_llava_row(row_id: str, image: str, questions: list[Question]) -> dict[str, object]:
    """Return one row of LLaVA's own format, with the picture before the first question."""
    turns = []
    for number, question in enumerate(questions):
        text = f"<image>\n{question.text}".strip() if number == 0 else question.text
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return {"id": row_id, "image": image, "conversations": turns}


def _write_json(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
