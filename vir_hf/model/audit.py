"""What was really loaded and what really learns, read off the modules and compared with the recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from vir_hf.model.quantization import bits_of
from vir_hf.model.trainable import PARTS, parameter_groups, part_of

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe


@dataclass
class ModuleGroup:
    """One line of the audit: weights of one part that are stored and trained alike.

    Attributes:
        part: language_model, projector or vision_tower.
        group: what kind of weights: embeddings, linear, head, other (norms and such), adapter.
        stored_as: a dtype, or `nf4`, `fp4`, `int8`.
        num_parameters: weights, not bytes; a packed 4-bit weight counts as what it stands for.
        num_trainable: how many of them learn.
        learning_rate: at the peak of the schedule; `None` for frozen weights.
    """

    part: str
    group: str
    stored_as: str
    num_parameters: int = 0
    num_trainable: int = 0
    num_bytes: int = 0
    learning_rate: float | None = None
    weight_decay: float | None = None


def audit_model(model: nn.Module, recipe: Recipe) -> list[ModuleGroup]:
    """Return what is stored how and what learns at which rate, by part and kind of weight."""
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, recipe)
        for parameter in group["params"]
    }
    found: dict[tuple[Any, ...], ModuleGroup] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if id(parameter) in seen or ".original_module." in name:
                continue
            seen.add(id(parameter))
            part, group = part_of(name), _kind(name, module)
            rate, decay = rates.get(id(parameter), (None, None))
            stored_as, count, num_bytes = _storage(parameter, module)
            key = (part, group, stored_as, parameter.requires_grad, rate)
            line = found.setdefault(key, ModuleGroup(part, group, stored_as, learning_rate=rate, weight_decay=decay))
            line.num_parameters += count
            line.num_bytes += num_bytes
            line.num_trainable += count if parameter.requires_grad else 0
            line.weight_decay = max(line.weight_decay or 0.0, decay) if decay is not None else line.weight_decay
    order = list(PARTS)
    return sorted(found.values(), key=lambda line: (order.index(line.part), line.learning_rate is not None))


def _kind(name: str, module: nn.Module) -> str:
    if "lora_" in name or "trainable_tokens_" in name:
        return "adapter"
    if name.removeprefix("base_model.model.").startswith("lm_head."):
        return "head"
    if isinstance(module, nn.Embedding) or "embedding" in type(module).__name__.lower():
        return "embeddings"
    if isinstance(module, nn.Linear) or bits_of(module):
        return "linear"
    return "other"


def _storage(parameter: nn.Parameter, module: nn.Module) -> tuple[str, int, int]:
    """How a weight is stored, how many values it stands for, and its bytes."""
    num_bytes = parameter.numel() * parameter.element_size()
    if bits_of(module) and not parameter.is_floating_point():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            absmax = state.absmax.numel() * state.absmax.element_size()
            return str(state.quant_type), state.shape.numel(), num_bytes + absmax
        return "int8", parameter.numel(), num_bytes
    return str(parameter.dtype).removeprefix("torch."), parameter.numel(), num_bytes


def audit_as_dict(lines: list[ModuleGroup], precision: str) -> dict[str, Any]:
    """Return what `audit.json` holds."""
    return {
        "precision": precision,
        "num_parameters": sum(line.num_parameters for line in lines),
        "num_trainable": sum(line.num_trainable for line in lines),
        "num_bytes": sum(line.num_bytes for line in lines),
        "groups": [asdict(line) for line in lines],
    }


def print_audit(lines: list[ModuleGroup], precision: str, console: Console) -> None:
    """Print the audit as a table."""
    table = Table(
        title="What is loaded and what learns",
        caption=precision,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("part", "weights", "stored"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "MiB", "trainable", "lr"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            line.part,
            line.group,
            line.stored_as,
            f"{line.num_parameters:,}",
            f"{line.num_bytes / 2**20:,.1f}",
            f"{line.num_trainable:,}" if line.num_trainable else "-",
            "-" if line.learning_rate is None else f"{line.learning_rate:g}",
        )
    total = sum(line.num_trainable for line in lines)
    table.add_section()
    everything = sum(line.num_parameters for line in lines)
    mebibytes = sum(line.num_bytes for line in lines) / 2**20
    table.add_row("", "", "all", f"{everything:,}", f"{mebibytes:,.1f}", f"{total:,}", "")
    console.print(table)
