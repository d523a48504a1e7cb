"""What the package takes from other libraries that they do not promise to keep: each name, why, and where it was last seen.

A library may change what stands here in any release. `tests/test_relied_on.py` holds that every name exists with the
parameters that are used, that the list is complete, and names the test that fails when one of them stops working. So a new
release is met by a test that says what moved, never by a run that trains something else. The dependencies in `setup.cfg`
are capped at the minor releases this was tried with; `make newest` tries the ones after.
"""

from __future__ import annotations

from typing import NamedTuple


class ReliedOn(NamedTuple):
    """One private name of another library.

    Attributes:
        owner: the class or module it belongs to, as a dotted path.
        name: the method, function or attribute.
        why: what it is used for, and why no public way does.
        parameters: of a method or function, in order, without `self`; `None` for an attribute.
        seen_in: the newest release it was tried with.
    """

    owner: str
    name: str
    why: str
    parameters: tuple[str, ...] | None = None
    seen_in: str = "transformers 5.24"


_TRAINER = "transformers.Trainer"

RELIED_ON = (
    # Methods of transformers' trainer that `LlavaTrainer` replaces or extends.
    ReliedOn(
        _TRAINER,
        "_get_num_items_in_batch",
        "the mean of a step is over its supervised tokens on all ranks, counted before the first micro-batch",
        ("batch_samples", "device"),
    ),
    ReliedOn(
        _TRAINER,
        "_get_grad_norm",
        "bad numbers are met after the backward pass and before the optimizer, where no callback may stop the step",
        ("model", "grad_norm"),
    ),
    ReliedOn(
        _TRAINER,
        "_save",
        "training_args.bin is a pickle and is not kept; save_model leaves no other moment to remove it",
        ("output_dir", "state_dict"),
    ),
    ReliedOn(
        "trl.SFTTrainer",
        "_save_checkpoint",
        "a checkpoint is written under another name on every rank and appears by one rename",
        ("model", "trial"),
        "TRL 1.16",
    ),
    ReliedOn(
        _TRAINER,
        "_load_from_checkpoint",
        "adapter, projector and other learning weights go back exactly, in fp32, with every one accounted for",
        ("resume_from_checkpoint", "model"),
    ),
    ReliedOn(
        _TRAINER,
        "_load_rng_state",
        "every rank has random states and counters of its own, read without unpickling code",
        ("checkpoint",),
    ),
    ReliedOn(
        _TRAINER,
        "_prepare_for_training",
        "everything a checkpoint holds is read inside it, DeepSpeed's files too, with weights-only loading forced",
        ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    ),
    ReliedOn(
        _TRAINER,
        "_load_optimizer_and_scheduler",
        "the schedule of a DeepSpeed checkpoint is also read where the run goes on without DeepSpeed",
        ("checkpoint",),
    ),
    ReliedOn(
        _TRAINER,
        "_run_epoch",
        "a run resumed at its last step would be trained one step more",
        (
            "model",
            "epoch",
            "train_dataloader",
            "steps_in_epoch",
            "num_update_steps_per_epoch",
            "trial",
            "ignore_keys_for_eval",
            "start_time",
            "resume_from_checkpoint",
            "epochs_trained",
            "steps_trained_in_current_epoch",
        ),
    ),
    ReliedOn(
        _TRAINER,
        "_finalize_training",
        "counters of a run resumed at its last step are put back before the end is reported",
        ("trial", "num_train_samples", "start_time"),
    ),
    ReliedOn(
        _TRAINER,
        "_determine_best_metric",
        "a new best is saved at once, also between two regular checkpoints, so that it is there to be loaded",
        ("metrics", "trial"),
    ),
    ReliedOn(
        _TRAINER,
        "_load_best_model",
        "the best weights go back as those of any checkpoint do, with what lies beside an adapter",
        (),
    ),
    # What it calls or sets.
    ReliedOn(_TRAINER, "_save_optimizer_and_scheduler", "writes a part of a checkpoint", ("output_dir",)),
    ReliedOn(_TRAINER, "_save_scaler", "writes a part of a checkpoint", ("output_dir",)),
    ReliedOn(
        _TRAINER, "_tr_loss", "the sum of losses since the last log line is kept in checkpoints and freed of bad steps"
    ),
    ReliedOn(_TRAINER, "_total_loss_scalar", "the mean loss at the end is over this session's steps"),
    ReliedOn(_TRAINER, "_globalstep_last_logged", "the mean that is logged passes over steps that were skipped"),
    ReliedOn(
        "trl.SFTTrainer",
        "_metrics",
        "TRL's own means since the last log line are kept in checkpoints",
        seen_in="TRL 1.16",
    ),
    ReliedOn(
        "trl.SFTTrainer", "_total_train_tokens", "TRL's token count, which restarts at 0 on resume", seen_in="TRL 1.16"
    ),
    ReliedOn(
        "accelerate.state.GradientState",
        "_set_sync_gradients",
        "gradients are reduced with the last micro-batch of a step, which is one item of the loader to accelerate",
        ("sync_gradients",),
        "accelerate 1.15",
    ),
    ReliedOn(
        "transformers.PreTrainedModel",
        "_hf_peft_config_loaded",
        "a projector beside 4-bit weights learns without an adapter, which upstream refuses",
    ),
    ReliedOn(
        "argparse.ArgumentParser",
        "_actions",
        "completion reads the options of a command from its parser, which has no public list of them",
        seen_in="Python 3.13",
    ),
    # Models and their configs.
    ReliedOn(
        "transformers.PretrainedConfig",
        "_attn_implementation",
        "which attention a loaded model really uses; the public argument only asks for one",
    ),
    ReliedOn(
        "transformers.PretrainedConfig",
        "_is_quantized",
        "says in the configs of the parts what is quantised, once parts are joined or widened",
    ),
    ReliedOn(
        "transformers.PreTrainedModel",
        "_from_config",
        "the names and shapes of a checkpoint's tensors without making them; the public method is the Auto classes' alone",
    ),
    ReliedOn(
        "llama_cpp.Llama",
        "_ctx",
        "an image's embeddings are evaluated between tokens, which the class itself does only for its own chat formats",
        seen_in="llama-cpp-python 0.3",
    ),
    ReliedOn(
        "transformers.core_model_loading",
        "_weight_conversions",
        "a joined model is saved in the Hub's key layout, which only loading would set",
    ),
    ReliedOn(
        "peft.tuners.lora.layer.LoraLayer",
        "_cast_input_dtype",
        "the fused LoRA layer casts its input as PEFT's own does",
        ("x", "dtype"),
        "PEFT 0.21",
    ),
    ReliedOn(
        "datasets.Dataset",
        "_fingerprint",
        "names a data set's content for the caches that depend on it, without a pass over it",
        seen_in="datasets 5.2",
    ),
    ReliedOn(
        "torch.nn.Module",
        "_modules",
        "a trial copy of an MLP has other layers than the one it is a copy of; set_submodule would change both",
        seen_in="torch 2.13",
    ),
    ReliedOn(
        "torch.ops.aten",
        "_scaled_dot_product_flash_attention_for_cpu",
        "returns the log-sum-exp that two attentions are joined with",
        seen_in="torch 2.13",
    ),
    ReliedOn(
        "torch.ops.aten",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "the gradient of the same",
        seen_in="torch 2.13",
    ),
)
