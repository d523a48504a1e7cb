"""Draws the picture of the README from a finished quickstart: `python docs/readme_picture.py outputs/quickstart`.

Above, six held-out images with the model's answers; below, the loss of stage 2 and the shares of exact answers.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vir_hf.publishing.card import draw_loss_curve

OUT = Path(__file__).resolve().parent / "_static" / "quickstart.png"
INK, BLUE, GREY = "#222222", "#2563eb", "#bbbbbb"


def main(run: str) -> None:
    """Read `samples.png` and `metrics.json` of the run and write the picture."""
    panel = Image.open(Path(run) / "samples.png").convert("RGB")
    metrics = json.loads((Path(run) / "metrics.json").read_text(encoding="utf-8"))
    curve = Image.open(io.BytesIO(draw_loss_curve(metrics["loss_history"]))).convert("RGB")
    width, half = panel.width, panel.width // 2
    curve = curve.resize((half, curve.height * half // curve.width), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (width, panel.height + curve.height), "white")
    picture.paste(panel, (0, 0))
    picture.paste(curve, (0, panel.height))
    picture.paste(scores(metrics, half, curve.height), (half, panel.height))
    picture.quantize(64).save(OUT, optimize=True)
    print(f"{OUT}: {picture.size}, {OUT.stat().st_size:,} bytes")


def scores(metrics: dict, width: int, height: int) -> Image.Image:
    """Return three bars: exact answers with the image, with a blank one, and by guessing."""
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    draw.text((20, 12), f"exact answers to {metrics['num_heldout_questions']} held-out questions", INK, font)
    bars = (("model", "heldout_accuracy"), ("blank image", "blind_accuracy"), ("best guess", "chance_accuracy"))
    longest = width - 220
    for number, (title, name) in enumerate(bars):
        top = 50 + number * 45
        draw.text((20, top + 5), title, INK, font)
        draw.rectangle([120, top, 120 + longest, top + 26], outline=GREY)
        draw.rectangle([120, top, 120 + int(longest * metrics[name]), top + 26], fill=BLUE if number == 0 else GREY)
        draw.text((130 + longest, top + 5), f"{metrics[name]:.3f}", INK, font)
    return image


if __name__ == "__main__":
    main(sys.argv[1])
