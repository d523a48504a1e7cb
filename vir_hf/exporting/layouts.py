"""Where each tensor of another project's checkpoint belongs in ours: a table for each layout, and no tensor without a line.

Source: the classes named beside each table, and transformers' own converters of the same checkpoints.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vir_hf.errors import RecipeError

LANGUAGE_MODEL, VISION_TOWER, PROJECTOR = "language_model", "vision_tower", "multi_modal_projector"
# Buffers that are computed, not learned; old versions of transformers saved them.
_COMPUTED = r".*(rotary_emb\.inv_freq|embeddings\.position_ids|attn\.(bias|masked_bias))"
_ORIGINAL = [
    (r"(?:base_model\.model\.)?model\.mm_projector\.(.+)", PROJECTOR),
    (r"(?:base_model\.model\.)?model\.vision_tower\.vision_tower\.(.+)", VISION_TOWER),
    (r"(?:base_model\.model\.)?((?:model\.(?:embed_tokens|layers|norm)\.|lm_head\.).+)", LANGUAGE_MODEL),
]
# Pattern of a name -> the part it belongs to; what the brackets hold is its name in that part.
TABLES: dict[str, list[tuple[str, str]]] = {
    # llava/model/llava_arch.py of haotian-liu/LLaVA
    "llava": _ORIGINAL,
    "llava-lora": _ORIGINAL,
    "llava-projector": [(r"(?:model\.)?mm_projector\.(.+)", PROJECTOR), (r"((?:0|2|4)\.(?:weight|bias))", PROJECTOR)],
    # tinyllava/model/modeling_tinyllava.py and connector/mlp.py of TinyLLaVA_Factory
    "tinyllava": [
        (r"language_model\.(.+)", LANGUAGE_MODEL),
        (r"vision_tower\._vision_tower\.(.+)", VISION_TOWER),
        (r"connector\._connector\.(.+)", PROJECTOR),
    ],
    # xtuner/model/modules/projector/modeling_projector.py of XTuner
    "xtuner": [(r"model\.(.+)", PROJECTOR)],
}


@dataclass(frozen=True)
class Move:
    """What became of one tensor.

    Attributes:
        source: its name in the checkpoint.
        part: the part of ours it belongs to; `None` if it is left out.
        target: its name in that part.
        what: `taken` (under its own name), `renamed`, `computed` (not read: it follows from the config) or `dropped`.
    """

    source: str
    part: str | None
    target: str
    what: str


def moves_of(layout: str, names: Iterable[str], drop: Sequence[str] = ()) -> list[Move]:
    """Return what becomes of every tensor of a checkpoint.

    Args:
        drop: patterns of names to leave out, as a shell writes them.

    Raises:
        RecipeError: a tensor that has no place, named.
    """
    moves, unknown = [], []
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in drop):
            moves.append(Move(name, None, "", "dropped"))
        elif re.fullmatch(_COMPUTED, name):
            moves.append(Move(name, None, "", "computed"))
        else:
            found = ((re.fullmatch(pattern, name), part) for pattern, part in TABLES[layout])
            match, part = next(((match, part) for match, part in found if match), (None, None))
            if match is None:
                unknown.append(name)
            else:
                moves.append(Move(name, part, match[1], "taken" if match[1] == name else "renamed"))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        why = " An image_newline belongs to LLaVA-1.6, which cuts an image into tiles." * any(
            "newline" in n for n in unknown
        )
        raise RecipeError(
            f"import: {', '.join(unknown[:3])}{more} has no place in the layout {layout!r}, and a weight is not left out in "
            f"silence.{why} --drop NAME leaves it out, and the model is then another one."
        )
    return moves
