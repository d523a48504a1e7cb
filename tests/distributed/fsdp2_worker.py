"""One rank of the FSDP2 test: `fully_shard` on our model as accelerate wraps it; loss and gradients against one process.

    torchrun --nproc-per-node 2 tests/distributed/fsdp2_worker.py ROOT {frozen,full}

Rank 0 has rows with pictures, rank 1 text alone.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_training
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy


def loss_sum(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The summed loss over a packed row's supervised positions, through the root's own forward."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    return cross_entropy(logits, batch["labels"][0, 1:], reduction="sum")


def main(root: Path, tower: str) -> None:
    from vir_hf.batches.collator import LlavaDataCollator
    from vir_hf.data.sources import load_llava_dataset
    from vir_hf.model.trainable import make_trainable

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    how = {"trainable.language_model": "full", "trainable.vision_tower": tower, "lora": "none"}
    model, processor, recipe = tiny_training.load(root, root / "unused", **how)
    model = make_trainable(model, recipe)
    rows = load_llava_dataset(root / "rows.json", root / "images", decode_images=False)
    numbers = [[], []]
    for number in range(len(rows)):
        numbers[0 if rows[number]["images"] else 1].append(number)
    collator = LlavaDataCollator(processor, max_length=256)
    batches = [collator([rows[number] for number in part[:3]]) for part in numbers]
    assert "pixel_values" in batches[0] and "pixel_values" not in batches[1]
    num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    alone = copy.deepcopy(model).train()
    expected = sum(loss_sum(alone, batch) for batch in batches) / num_items
    expected.backward()

    for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
        fully_shard(layer)
    fully_shard(model)
    model.train()
    loss = loss_sum(model, batches[rank]) / num_items
    (loss * distributed.get_world_size()).backward()  # FSDP takes the mean over ranks
    distributed.all_reduce(loss := loss.detach())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    num_compared = 0
    wanted = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = parameter.grad.full_tensor()
            torch.testing.assert_close(
                found, wanted[name].grad, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
            )
            num_compared += 1
    # Every rank runs everything together when it evaluates, too.
    model.eval()
    with torch.no_grad():
        loss_sum(model, batches[rank])
    if rank == 0:
        print(f"fsdp2 {tower}: loss {float(loss):.7f}, {num_compared} gradients equal", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
