"""One picture that shows held-out pictures with the question, the model's answer and whether it is right."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

EDGE = 320
MARGIN = 24
TEXT_HEIGHT = 62
COLUMNS = 3
INK, RIGHT, WRONG = (30, 30, 30), (20, 120, 50), (190, 30, 30)


@dataclass(frozen=True)
class Sample:
    """A picture, what was asked, the right answer, and what the model said."""

    image: Image.Image
    question: str
    answer: str
    given: str


def draw_panel(samples: list[Sample]) -> Image.Image:
    """Return all samples in rows of three; a wrong answer stands in red, with the right one behind it."""
    num_rows = -(-len(samples) // COLUMNS)
    width = MARGIN + COLUMNS * (EDGE + MARGIN)
    panel = Image.new("RGB", (width, MARGIN + num_rows * (EDGE + TEXT_HEIGHT + MARGIN)), (255, 255, 255))
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(size=15)
    for number, sample in enumerate(samples):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + column * (EDGE + MARGIN), MARGIN + row * (EDGE + TEXT_HEIGHT + MARGIN)
        panel.paste(sample.image.resize((EDGE, EDGE), Image.Resampling.NEAREST), (left, top))
        is_right = sample.given == sample.answer
        verdict = sample.given if is_right else f"{sample.given or '(nothing)'}  (it is {sample.answer})"
        pen.text((left, top + EDGE + 8), _fitted(pen, sample.question, font), INK, font)
        pen.text((left, top + EDGE + 34), _fitted(pen, verdict, font), RIGHT if is_right else WRONG, font)
    return panel


def _fitted(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the text, shortened so that it does not run into its neighbour."""
    shown = text
    while pen.textlength(shown, font) > EDGE:
        text = text[:-1]
        shown = text.rstrip() + "…"
    return shown
