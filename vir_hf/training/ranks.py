"""What several processes decide together: an action fails on all of them or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import distributed

from vir_hf.errors import RecipeError, RunError

if TYPE_CHECKING:
    pass


def together(action: Callable[[], Any]) -> Any:
    """Run an action on every rank and return its result; if it fails on one rank, it fails on all.

    Raises:
        RecipeError, RunError: what this rank's action raised, or else the message of the rank it failed on.
    """
    error: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        failures: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(failures, None if error is None else (type(error).__name__, str(error)))
        if error is None:
            for rank, failure in enumerate(failures):
                if failure is not None:
                    kind = RecipeError if failure[0] == "RecipeError" else RunError
                    raise kind(f"rank {rank}: {failure[1]}")
    if error is not None:
        raise error
    return result


def broadcast(value: Any) -> Any:
    """Return what rank 0 holds, on every rank."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def rank_0(action: Callable[[], Any], *, is_main: bool) -> Any:
    """Run an action on rank 0 alone and return its result on every rank; if it fails there, it fails on all."""
    return broadcast(together(lambda: action() if is_main else None))
