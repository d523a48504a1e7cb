"""Going on from a ZeRO checkpoint with another engine or number of processes: whole fp32 weights, a new optimizer.

DeepSpeed's optimizer state is cut into as many pieces as there were processes and goes back into as many only. The fp32
weights in it can be put together, and the step and with it the position in the data do not depend on the layout.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import nn

from vir_hf.errors import RunError
from vir_hf.training.state import copy_in, load_weights

if TYPE_CHECKING:
    from vir_hf.training.resume import ResumePoint

logger = logging.getLogger(__name__)


def load_if_needed(model: nn.Module, point: ResumePoint, world_size: int, *, is_deepspeed: bool) -> bool:
    """Put whole weights into the model where the engine cannot read the checkpoint itself; return whether it was so.

    Every rank must call it before the model is wrapped.

    Raises:
        RunError: weights that are missing or do not fit.
    """
    was_deepspeed = any(point.path.glob("global_step*"))
    if was_deepspeed == is_deepspeed and (not is_deepspeed or point.position["world_size"] == world_size):
        return False
    logger.warning(
        "%s: written by %s%s processes, going on with %s%s: the weights and the position in the data are kept, the optimizer's "
        "state starts anew",
        point.path,
        "DeepSpeed on " if was_deepspeed else "",
        point.position["world_size"],
        "DeepSpeed on " if is_deepspeed else "",
        world_size,
    )
    if was_deepspeed:
        load_zero_weights(model, point.path)
    else:
        load_weights(model, point.path)
    return True


def load_zero_weights(model: nn.Module, folder: Path) -> None:
    """Copy the fp32 weights of a ZeRO checkpoint, put together from every rank's piece, into the model.

    Raises:
        RunError: DeepSpeed is missing, or a learning weight is.
    """
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise RunError(
            f"{folder}: was written by DeepSpeed, which is not installed: pip install 'vir-hf[gpu]'."
        ) from error
    state: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    written = copy_in(model, state, folder)
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name, parameter in learning if parameter.data_ptr() not in written]
    if missing:
        raise RunError(f"{folder}: lacks {missing[:3]}; it was written for another choice of trainable weights.")


@contextlib.contextmanager
def optimizer_starts_anew() -> Iterator[None]:
    """Leave DeepSpeed's own part of a checkpoint unread; step, schedule and random states are restored as always.

    transformers 5.23 has no switch for it: with DeepSpeed, resuming means `engine.load_checkpoint`.
    """
    with mock.patch("transformers.trainer.deepspeed_load_checkpoint", lambda *args, **kwargs: None):
        yield
