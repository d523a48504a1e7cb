"""What we take from other libraries without their promise: it exists as it is used, the list is complete, and each is tested."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl

from vir_hf.relied_on import RELIED_ON, ReliedOn
from vir_hf.training.trainer import LlavaTrainer

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "vir_hf").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
# Our trainer and the classes of ours that it is made of.
OURS = [cls for cls in LlavaTrainer.__mro__ if cls.__module__.startswith("vir_hf.")]
# Private by their form, but documented.
DOCUMENTED = {"_replace": "typing.NamedTuple", "_exit": "os"}

# The test that fails when a name stops doing what we use it for: `tests/FILE::NAME`.
BEHAVIOUR = {
    "_get_num_items_in_batch": "test_trainer.py::test_a_step_is_scaled_by_the_supervised_tokens_of_all_its_micro_batches",
    "_get_grad_norm": "test_safeguards.py::test_a_bad_gradient_with_a_good_loss_is_seen",
    "_save": "test_trainer.py::test_no_pickle_of_the_arguments_is_left_in_a_saved_folder",
    "_save_checkpoint": "test_resume.py::test_a_failed_write_leaves_the_older_checkpoint_and_says_so",
    "_load_from_checkpoint": "test_resume.py::test_a_resumed_run_ends_with_the_same_bits",
    "_load_rng_state": "test_resume.py::test_a_resumed_run_ends_with_the_same_bits",
    "_prepare_for_training": "test_trainer.py::test_nothing_in_a_checkpoint_is_unpickled_into_code",
    "_load_optimizer_and_scheduler": "test_resume.py::test_any_checkpoint_will_do_also_the_last",
    "_run_epoch": "test_resume.py::test_a_last_step_inside_an_epoch_is_not_exceeded",
    "_finalize_training": "test_resume.py::test_any_checkpoint_will_do_also_the_last",
    "_determine_best_metric": "test_best_model.py::"
    "test_the_best_is_kept_under_any_limit_and_saved_between_two_regular_checkpoints",
    "_load_best_model": "test_best_model.py::test_the_best_steps_bits_are_saved",
    # Promised, and extended by ours.
    "get_train_dataloader": "test_trainer.py::test_the_steps_of_a_run_hold_the_rows_its_sampler_planned",
    "get_eval_dataloader": "test_held_out.py::test_the_loss_is_a_mean_over_tokens_however_rows_are_batched",
    "evaluation_loop": "test_held_out.py::test_the_loss_is_a_mean_over_tokens_however_rows_are_batched",
    "get_batch_samples": "test_trainer.py::test_the_time_a_step_waits_for_its_data_is_logged",
    "training_step": "test_trainer.py::test_a_step_is_scaled_by_the_supervised_tokens_of_all_its_micro_batches",
    "compute_loss": "test_trainer.py::test_a_step_is_scaled_by_the_supervised_tokens_of_all_its_micro_batches",
    "create_optimizer": "test_trainer.py::test_parts_learn_at_the_rates_the_recipe_gives_them",
    "create_scheduler": "test_trainer.py::test_a_run_whose_every_step_warms_up_is_told_so",
    "evaluate": "test_trainer.py::test_evaluating_between_steps_changes_no_bit_of_training",
    "log": "test_trainer.py::test_a_line_of_the_log_says_tokens_speed_waiting_and_memory",
    "train": "test_trainer.py::test_an_error_while_another_rank_is_gone_names_that_rank",
}


def owner_of(entry: ReliedOn) -> Any:
    """The class or module an entry names."""
    parts = entry.owner.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{entry.owner}: nothing of that name can be imported")


@pytest.mark.parametrize("entry", RELIED_ON, ids=lambda entry: f"{entry.owner}.{entry.name}")
def test_every_name_is_there_as_it_is_used(entry: ReliedOn) -> None:
    pytest.importorskip(entry.owner.split(".")[0])  # an engine of `vir-hf export` need not be installed
    owner = owner_of(entry)
    if entry.parameters is not None:
        given = list(inspect.signature(getattr(owner, entry.name)).parameters)
        assert tuple(name for name in given if name != "self") == entry.parameters
        return
    if hasattr(owner, entry.name):
        return
    # An attribute that only instances have: the module, or that of the class or of one it extends, sets it or reads it.
    modules = [inspect.getmodule(part) for part in owner.__mro__[:-1]] if isinstance(owner, type) else [owner]
    sources = [inspect.getsource(module) for module in modules]
    assert any(re.search(rf"\.{entry.name}\b|['\"]{entry.name}['\"]", source) for source in sources)


def names_of_ours() -> set[str]:
    """Private names that our own sources define: functions, classes, variables, and attributes set on `self`."""
    ours = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                ours.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                ours.add(node.target.attr)
    return ours


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_of_a_library_is_used_that_the_list_does_not_hold() -> None:
    ours, listed = names_of_ours(), {entry.name for entry in RELIED_ON} | set(DOCUMENTED)
    missing = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("vir_hf"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
                names = [str(part.value) for part in node.args[1:2] if isinstance(part, ast.Constant)]
            missing += [
                f"{path.relative_to(ROOT)}:{node.lineno} {name}"
                for name in names
                if is_private(name) and name not in ours | listed
            ]
    assert missing == [], "use a public way, or name it in vir_hf/relied_on.py with the reason"


def test_every_private_part_of_the_trainers_that_our_trainer_replaces_or_sets_is_listed() -> None:
    upstream = inspect.getsource(transformers.Trainer) + inspect.getsource(trl.SFTTrainer)
    theirs = set(re.findall(r"(?:def |self\.)(_[a-z]\w*)", upstream))
    nodes = [
        node for cls in OURS for node in ast.walk(ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8")))
    ]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)}
    used |= {node.name for node in nodes if isinstance(node, ast.FunctionDef) and is_private(node.name)}
    assert used & theirs <= {entry.name for entry in RELIED_ON}


def test_the_list_holds_nothing_that_is_not_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES if path.name != "relied_on.py")
    assert [entry.name for entry in RELIED_ON if not re.search(rf"\b{entry.name}\b", text)] == []


def test_every_replaced_method_names_the_test_that_fails_without_it() -> None:
    upstream = set(dir(trl.SFTTrainer))
    assert set(BEHAVIOUR) == {
        name for cls in OURS for name in vars(cls) if name in upstream and not name.startswith("__")
    }
    for place in BEHAVIOUR.values():
        name, _, test = place.partition("::")
        (file,) = (ROOT / "tests").rglob(name)
        assert not test or f"def {test}(" in file.read_text(encoding="utf-8"), place


def test_dependencies_whose_private_parts_are_used_are_capped_at_the_minor_release_that_was_tried() -> None:
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for library, version in (("transformers", transformers.__version__), ("trl", trl.__version__)):
        cap = re.search(rf"^    {library}>=[\d.]+,<(\d+)\.(\d+)$", text, re.MULTILINE)
        assert cap, f"{library} is not capped at a minor release"
        major, minor = map(int, version.split(".")[:2])
        assert (major, minor) < (int(cap[1]), int(cap[2])) <= (major, minor + 1)
