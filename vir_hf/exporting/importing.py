"""`vir-hf import`: a checkpoint of another project as a folder that opens here, with a report of every tensor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.exporting.layouts import LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, Move, moves_of
from vir_hf.exporting.original import TOWER_FOLDER
from vir_hf.exporting.plain import saved_dtype
from vir_hf.exporting.tensors import StoredTensors, stored_tensors
from vir_hf.model.build import build
from vir_hf.model.configs import WHOLE_MODEL_TYPES, check_vision_tower, read_config
from vir_hf.model.for_use import load_run
from vir_hf.model.foreign import NON_LORA_FILE, ORIGINAL_MODEL_TYPES, PROJECTOR_FILE, layout_of_folder, read_fields
from vir_hf.model.parts import VISION_TOWERS
from vir_hf.model.projector_files import put_projector
from vir_hf.rows.templates import is_ours

REPORT = "import.json"
_ASPECT_RATIOS = {"pad": "pad", "square": "crop", None: "crop"}
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_PROJECTORS = {"linear": "linear", "mlp2x_gelu": "mlp2x_gelu", "mlp3x_gelu": "mlp3x_gelu"}


@dataclass(frozen=True)
class Source:
    """What is to be imported, and what it does not bring itself.

    Attributes:
        folder: where it lies.
        layout: a key of `LAYOUTS`.
        fields: its config.json.
        base: the language model of an adapter or a projector.
        vision_tower: the tower, in place of the one the config names.
        template: the chat template it was trained with, a word of ours; the tokenizer's own by default, else Vicuna's.
        drop: patterns of tensors to leave out.
    """

    folder: Path
    layout: str
    fields: Mapping[str, Any]
    base: str | None = None
    vision_tower: str | None = None
    template: str | None = None
    drop: Sequence[str] = ()


@dataclass
class Imported:
    """What an import made: where, of what, and what became of every tensor.

    Attributes:
        from_elsewhere: parts that the checkpoint does not hold, and where they were taken from.
    """

    out: Path
    layout: str
    moves: list[Move] = field(default_factory=list)
    from_elsewhere: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many tensors were taken, renamed, computed and dropped."""
        return dict(Counter(move.what for move in self.moves))


def import_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
    drop: Sequence[str] = (),
) -> Imported:
    """Make a folder that opens here of another project's checkpoint; `out` appears whole or not at all.

    Args:
        source: a folder, or a repository on the Hub.
        base, vision_tower, template, drop: see `Source`.

    Raises:
        RecipeError: no checkpoint that is known, a tensor without a place or missing, a file that is damaged or runs code.
    """
    folder = _folder_of(os.fspath(source))
    fields = read_fields(folder)
    layout = layout_of_folder(folder)
    if layout is None and fields.get("model_type") in WHOLE_MODEL_TYPES:
        layout = "llava-hf"
    if layout is None:
        raise RecipeError(
            f"{source}: is no checkpoint that is known here (model type {fields.get('model_type')!r}). Expected one of the "
            "original LLaVA, of llava-hf, TinyLLaVA or XTuner; docs/export.md says by what each is known."
        )
    imported = Imported(Path(out), layout)
    with files.folder_in_one_piece(Path(out)) as staging:
        if layout == "llava-hf":
            _hub_layout(folder, imported, staging)
        else:
            _other_layout(Source(folder, layout, fields, base, vision_tower, template, drop), imported, staging)
        report = {**asdict(imported), "out": str(out), "counts": imported.counts()}
        files.write_text(staging / REPORT, files.as_report(report))
    return imported


def _folder_of(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source))
    except Exception as error:  # whatever its HTTP client raises: no name, no connection, no access
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RecipeError(
            f"{source}: is neither a folder nor a repository that can be reached on the Hub: {reason} Name a folder."
        ) from error


def _hub_layout(folder: Path, imported: Imported, staging: Path) -> None:
    """A model of transformers, of whatever version: opened by its own names, saved in today's."""
    names = list(stored_tensors(folder))  # a damaged or missing shard is said here
    model, processor = load_run(folder, dtype=saved_dtype(str(folder)), device="cpu")
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    written = set(stored_tensors(staging))
    for name in names:
        what = "taken" if name in written else "computed" if name.endswith(("inv_freq", "position_ids")) else "renamed"
        imported.moves.append(Move(name, None, name if name in written else "", what))


def _other_layout(source: Source, imported: Imported, staging: Path) -> None:
    stored = _stored(source)
    imported.moves = moves_of(source.layout, stored, source.drop)
    parts: dict[str, dict[str, torch.Tensor]] = {LANGUAGE_MODEL: {}, VISION_TOWER: {}, PROJECTOR: {}}
    for move in imported.moves:
        if move.part is not None:
            parts[move.part][move.target] = stored[move.source]
    if not parts[PROJECTOR]:
        raise RecipeError(
            f"{source.folder}: holds no projector, so it is no LLaVA model. Name the folder that has one."
        )
    words = _words(source)
    language_model = _language_model(source, parts[LANGUAGE_MODEL], imported)
    tower, tower_place = _vision_tower(source, words, parts[VISION_TOWER], imported, language_model.dtype)
    tokenizer = _tokenizer(source, language_model)
    model, processor = build(
        language_model,
        tower,
        source.template or ("auto" if getattr(tokenizer, "chat_template", None) else "vicuna_v1"),
        tokenizer=tokenizer,
        image_processor=_image_processor(tower_place, source),
        projector_type=words["projector_type"],
        image_aspect_ratio=words["image_aspect_ratio"],
        vision_feature_layer=words["vision_feature_layer"],
        vision_feature_select_strategy=words["strategy"],
    )
    put_projector(model, parts[PROJECTOR], source.folder, source.folder)
    model.save_pretrained(staging)
    processor.save_pretrained(staging)


def _stored(source: Source) -> StoredTensors:
    if source.layout == "llava-lora":
        path = source.folder / NON_LORA_FILE
        if not path.is_file():
            raise RecipeError(
                f"{source.folder}: has an adapter and no {NON_LORA_FILE}, which holds the projector. Fetch it too."
            )
        return StoredTensors([path])
    if source.layout == "llava-projector":
        return StoredTensors([source.folder / PROJECTOR_FILE])
    return stored_tensors(source.folder / "projector" if source.layout == "xtuner" else source.folder)


def _words(source: Source) -> dict[str, Any]:
    """Projector, layer, strategy and squares in our words.

    Raises:
        RecipeError: words that ours do not know.
    """
    fields = source.fields
    if source.layout == "tinyllava":
        projector, layer = fields["connector_type"], fields.get("vision_feature_layer", -2)
        feature, ratio = (
            fields.get("vision_feature_select_strategy", "patch"),
            fields.get("image_aspect_ratio", "square"),
        )
    elif source.layout == "xtuner":
        own = read_fields(source.folder / "projector")
        projector, layer, feature, ratio = (
            f"mlp{own.get('depth', 2)}x_gelu",
            own.get("visual_select_layer", -2),
            "patch",
            "pad",
        )
    else:
        default = "mlp2x_gelu" if source.layout == "llava-projector" and not fields else "linear"
        projector, layer = fields.get("mm_projector_type", default), fields.get("mm_vision_select_layer", -2)
        feature, ratio = fields.get("mm_vision_select_feature", "patch"), fields.get("image_aspect_ratio")
        ratio = "pad" if not fields else ratio
    if ratio and "anyres" in str(ratio) and any("newline" in pattern for pattern in source.drop):
        ratio = "pad"
    for word, value, known in (
        ("projector", projector, _PROJECTORS),
        ("feature", feature, _STRATEGIES),
        ("image_aspect_ratio", ratio, _ASPECT_RATIOS),
    ):
        if value not in known:
            raise RecipeError(
                f"{source.folder}: its {word} is {value!r}, which has no counterpart here; expected one of "
                f"{', '.join(map(str, known))}."
            )
    strategy, square = _STRATEGIES[feature], _ASPECT_RATIOS[ratio]
    return {
        "projector_type": projector,
        "vision_feature_layer": layer,
        "strategy": strategy,
        "image_aspect_ratio": square,
    }


def _language_model(source: Source, tensors: dict[str, torch.Tensor], imported: Imported) -> PreTrainedModel:
    if source.layout in ("llava", "tinyllava"):
        return _from_tensors(AutoModelForCausalLM, _text_config(source), tensors, source)
    name = source.base or read_fields(source.folder, "adapter_config.json").get("base_model_name_or_path")
    name = name or source.fields.get("_name_or_path")
    if not name:
        raise RecipeError(f"{source.folder}: does not say which language model it belongs to. Name it with --base.")
    read_config(name, "--base")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    imported.from_elsewhere[LANGUAGE_MODEL] = name
    adapter = source.folder / "llm_adapter" if source.layout == "xtuner" else source.folder
    if (adapter / "adapter_config.json").is_file():
        model = _merged(model, adapter, imported)
    unknown = [key for key in tensors if key not in model.state_dict()]
    if unknown:
        raise RecipeError(
            f"{source.folder}: {unknown[0]} is no weight of {name}. Name the language model it belongs to with --base."
        )
    model.load_state_dict({key: value.to(model.dtype) for key, value in tensors.items()}, strict=False)
    return model


def _merged(model: Any, adapter: Path, imported: Imported) -> PreTrainedModel:
    """A language model or tower with an adapter in its weights; every tensor of the adapter has to have a place."""
    stored = list(stored_tensors(adapter, "adapter_model"))
    wrapped = PeftModel.from_pretrained(model, str(adapter))
    known = set(get_peft_model_state_dict(wrapped))
    unknown = [name for name in stored if name not in known]
    if unknown:
        raise RecipeError(
            f"{adapter}: {unknown[0]} and {len(unknown) - 1} more of its tensors are of no layer of {model.name_or_path}. Name "
            "the model it belongs to with --base."
        )
    imported.moves += [Move(name, LANGUAGE_MODEL, "", "merged") for name in stored]
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged


def _text_config(source: Source) -> Any:
    if source.layout == "tinyllava":
        words = dict(source.fields.get("text_config") or {})
        kind = words.pop("model_type", "llama")
    else:
        kind = ORIGINAL_MODEL_TYPES.get(str(source.fields.get("model_type")), "")
        words = {
            key: value for key, value in source.fields.items() if not key.startswith("mm_") and key != "model_type"
        }
    try:
        return AutoConfig.for_model(kind, **{key: value for key, value in words.items() if key != "architectures"})
    except ValueError as error:
        raise RecipeError(
            f"{source.folder}: its language model is of type {source.fields.get('model_type')!r}, which has no counterpart in "
            "transformers. Expected one of LLaVA's for Llama, Mistral or Qwen2."
        ) from error


def _from_tensors(model_class: Any, config: Any, tensors: dict[str, torch.Tensor], source: Source) -> PreTrainedModel:
    """Build a part of its config and tensors.

    Raises:
        RecipeError: a tensor that is missing, has no place, or is of another shape.
    """
    first = next(iter(tensors.values()), None)
    if first is None:
        raise RecipeError(f"{source.folder}: holds no language model. Name the folder that has its shards.")
    config.dtype = first.dtype
    shapeless = model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config
    with torch.device("meta"):
        empty = shapeless(config)
    expected = {name: value.shape for name, value in empty.state_dict().items()}
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
    missing = [name for name in expected if name not in tensors and name not in tied]
    unknown = [name for name in tensors if name not in expected]
    wrong = [name for name, value in tensors.items() if name in expected and expected[name] != value.shape]
    if missing or unknown or wrong:
        kinds = (("missing", missing), ("without a place", unknown), ("of another shape", wrong))
        found = "; ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in kinds if names)
        raise RecipeError(f"{source.folder}: its weights do not fit its config.json: {found}. Fetch both again.")
    model: PreTrainedModel = type(empty).from_pretrained(None, config=config, state_dict=tensors, dtype=first.dtype)
    return model


def _vision_tower(
    source: Source, words: Mapping[str, Any], tensors: dict[str, torch.Tensor], imported: Imported, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """The tower, and the name or folder it is known by, where its image processor is."""
    place = _tower_place(source)
    if source.layout == "tinyllava" and source.fields.get("vision_config") and tensors:
        config = AutoConfig.for_model(**_with_type(source.fields["vision_config"], place))
    else:
        config, _ = read_config(place, "--vision-tower")
        check_vision_tower(config, place)
        config = getattr(config, "vision_config", config)
    tower_class: Any = VISION_TOWERS[config.model_type]
    if tensors:
        plain = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
        with torch.device("meta"):
            own = tower_class._from_config(config).state_dict()
        prefix = "" if any(name in own for name in plain) else "vision_model."
        expected = {f"{prefix}{name}": value for name, value in plain.items()}
        return _from_tensors(tower_class, config, expected, source), place
    imported.from_elsewhere[VISION_TOWER] = place
    tower: PreTrainedModel = tower_class.from_pretrained(place, dtype="auto")
    adapter = source.folder / "visual_encoder_adapter"
    return (_merged(tower, adapter, imported) if (adapter / "adapter_config.json").is_file() else tower), place


def _with_type(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = fields.get("model_type") or ("siglip_vision_model" if "siglip" in place.lower() else "clip_vision_model")
    return {**{key: value for key, value in fields.items() if key != "architectures"}, "model_type": kind}


def _tower_place(source: Source) -> str:
    """The tower beside the checkpoint if it has one, else what the config names."""
    if source.vision_tower:
        return source.vision_tower
    if (source.folder / TOWER_FOLDER / "config.json").is_file():
        return str(source.folder / TOWER_FOLDER)
    if (source.folder / "visual_encoder" / "config.json").is_file():
        return str(source.folder / "visual_encoder")
    name = source.fields.get("mm_vision_tower") or source.fields.get("vision_model_name_or_path")
    if not name:
        raise RecipeError(
            f"{source.folder}: does not say which vision tower it belongs to. Name it with --vision-tower."
        )
    return str(name).split(":")[-1]


def _tokenizer(source: Source, language_model: PreTrainedModel) -> Any:
    has_own = any((source.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    place = str(source.folder) if has_own else language_model.name_or_path or source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, legacy=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            f"{place}: holds no tokenizer, and a model works only with its own. Put its files there."
        ) from error
    if len(tokenizer) > language_model.get_input_embeddings().weight.shape[0] + 8:
        raise RecipeError(
            f"{place}: its tokenizer has {len(tokenizer)} tokens and the embedding "
            f"{language_model.get_input_embeddings().weight.shape[0]} rows, so they do not belong together."
        )
    template = source.folder / "chat_template.jinja"
    if source.template is None and template.is_file() and is_ours(template.read_text(encoding="utf-8")):
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _image_processor(place: str, source: Source) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{place}: has no image processor (preprocessor_config.json), so nothing says how an image is seen. "
            "Name the tower's own folder or Hub id with --vision-tower."
        ) from error
