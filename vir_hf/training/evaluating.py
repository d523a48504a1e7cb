"""Evaluation between steps: exact means over supervised tokens, rows packed as in training, nothing of training disturbed."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from vir_hf.training.step import StepTrainer, compact_supervised, model_inputs


class EvaluatingTrainer(StepTrainer):
    """The steps of a run and the evaluation between them."""

    control: Any
    _log_time: float

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Upstream's evaluation, which leaves training's random numbers as they were and is no part of its time per step."""
        start = time.perf_counter()
        python, numpy_state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng():
                return super().evaluate(*args, **kwargs)
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
            self._log_time += time.perf_counter() - start

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of consecutive rows, dealt to the ranks in turns; every rank gets as many, the last one twice if need be.

        Not sharded by accelerate, which fills up with rows that would be counted again.
        """
        rows = self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
        size, rank, num_ranks = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        dealt = batches[rank::num_ranks]
        if len(dealt) < -(-len(batches) // num_ranks):
            dealt.append(
                dealt[-1] if dealt else batches[0]
            )  # computed, so that no rank waits for this one, and not counted
        workers = self.args.dataloader_num_workers
        return DataLoader(
            rows,
            batch_sampler=dealt,
            collate_fn=self.data_collator,
            num_workers=min(workers, len(dealt)),
            pin_memory=False,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return mean loss and share of right next tokens over all supervised tokens of all ranks, each token once.

        Upstream's means are over batches, whatever they hold.
        """
        model = self.model_wrapped
        model.eval()
        num_rows, num_batches = len(dataloader.dataset), 0  # type: ignore[arg-type]
        num_counted = -(-num_rows // self.args.per_device_eval_batch_size)
        sums = torch.zeros(3, dtype=torch.float64)  # of losses, of right tokens, of tokens
        for number, batch in enumerate(dataloader):
            is_counted = number * self.args.world_size + self.args.process_index < num_counted
            inputs = model_inputs(batch)
            if "segment_lengths" in inputs:
                inputs = compact_supervised(inputs)
            inputs = {**send_to_device(inputs, self.args.device), "use_cache": False}
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**inputs, fused_lm_head=True)
            if is_counted:
                counts = (-outputs.log_probs.double().sum(), outputs.is_top1.sum(), outputs.label_mask.sum())
                sums += torch.stack([count.double() for count in counts]).cpu()
            num_batches += 1
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums.to(self.args.device).unsqueeze(0)).cpu().sum(0)
        loss, correct, num_tokens = sums.tolist()
        metrics = {f"{metric_key_prefix}_supervised_tokens": num_tokens}
        if num_tokens:
            metrics[f"{metric_key_prefix}_loss"] = loss / num_tokens
            metrics[f"{metric_key_prefix}_token_accuracy"] = correct / num_tokens
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_rows)
