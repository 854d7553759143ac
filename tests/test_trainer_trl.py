"""fastdpo.DPOTrainer beside trl.DPOTrainer: the same numbers, the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import fastdpo
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.trainers import TOKEN_METRICS, tiny_llama, weights

trl = pytest.importorskip("trl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("accumulate", "steps"), [(2, 20), (1, 6)], ids=["accumulated", "plain"])
def test_same_numbers_as_trl(accumulate: int, steps: int, tmp_path: Path) -> None:
    """Per-step loss within 1e-5 and final weights within 1e-4 of trl.DPOTrainer, and all its metrics."""
    tokenizer = byte_tokenizer()
    texts = Dataset.from_list(
        [
            {"prompt": f"Count from {i}:", "chosen": f" {i} {i + 1} {i + 2}", "rejected": " " + "no " * (i % 7 + 1)}
            for i in range(64)
        ]
    )
    settings = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulate,
        "max_steps": steps,
        "max_length": 40,
        "beta": 0.3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": 3,
    }
    start = tiny_llama()
    start.save_pretrained(tmp_path / "start")
    history, final = {}, {}
    for name, library in (("trl", trl), ("fastdpo", fastdpo)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
        trainer = library.DPOTrainer(
            model=model,
            args=library.DPOConfig(output_dir=str(tmp_path / name), **settings),
            train_dataset=texts,
            processing_class=tokenizer,
        )
        trainer.train()
        history[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        final[name] = weights(model)
    assert len(history["trl"]) == len(history["fastdpo"]) == steps
    # TRL averages means of micro-batches, whatever their numbers of tokens; here every token counts the same
    apart = {"rewards/accuracies", "loss"} | (TOKEN_METRICS if accumulate > 1 else set())
    for theirs, ours in zip(history["trl"], history["fastdpo"], strict=True):
        assert abs(theirs["loss"] - ours["loss"]) < 1e-5, theirs["step"]
        assert set(theirs) <= set(ours), "a metric of TRL's is missing"
        for metric in set(theirs) - apart:
            assert ours[metric] == pytest.approx(theirs[metric], rel=2e-4, abs=2e-5), (theirs["step"], metric)
        if theirs["step"] > 1:  # at step 1 all pairs tie: one half here, 0 there
            assert ours["rewards/accuracies"] == theirs["rewards/accuracies"]
    moved = (final["trl"] - weights(start)).norm()
    assert moved > 0.005 * weights(start).norm()
    assert (final["trl"] - final["fastdpo"]).norm() < 1e-4 * final["trl"].norm()
    assert (final["trl"] - final["fastdpo"]).norm() < 1e-2 * moved


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("logging_steps", [2, 100], ids=["after-a-log", "shorter-than-logging_steps"])
def test_the_last_record_is_as_trls(logging_steps: int, tmp_path: Path) -> None:
    """It has what was measured since the last log, under the same names."""
    texts = Dataset.from_list(
        [{"prompt": f"{i} is", "chosen": " so" * (i % 3 + 1), "rejected": " no"} for i in range(12)]
    )
    last = {}
    for name, library in (("trl", trl), ("fastdpo", fastdpo)):
        reference = tiny_llama(num_hidden_layers=1)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.05)
        trainer = library.DPOTrainer(
            model=tiny_llama(num_hidden_layers=1),
            ref_model=reference,
            args=library.DPOConfig(
                output_dir=str(tmp_path / name),
                **{"learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0},
                **{"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": logging_steps, "beta": 0.3},
                **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False},
                **{"bf16": False, "use_cpu": True, "seed": 3},
            ),
            train_dataset=texts,
            processing_class=byte_tokenizer(),
        )
        returned = trainer.train().metrics
        last[name] = trainer.state.log_history[-1]
        assert returned.items() <= last[name].items()
        assert "rewards/margins" in returned
    assert last["trl"]["rewards/margins"] != 0
    assert set(last["trl"]) <= set(last["fastdpo"])
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
    # TRL's are over all three steps there, ours over the last one
    apart = TOKEN_METRICS if logging_steps > 3 else set()
    for metric in set(last["trl"]) - timed - apart:
        assert last["fastdpo"][metric] == pytest.approx(last["trl"][metric], rel=1e-3, abs=2e-5), metric


OBJECTIVES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")),
    *({"loss_type": name} for name in ("aot", "aot_unpaired", "apo_down", "discopop", "sft", "sigmoid_norm")),
    {"loss_type": "exo_pair", "label_smoothing": 0.1},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"use_weighting": True},
    {"ld_alpha": 0.4},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_same_update_as_trl(objective: dict[str, Any], tmp_path: Path) -> None:
    """One step of plain gradient descent, against a reference that is another model, by every objective of TRL's."""
    rows = [{"prompt": f"Say {i}:", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no" * (i % 4 + 1)} for i in range(4)]
    logged, moved = {}, {}
    for name, library in (("trl", trl), ("fastdpo", fastdpo)):
        model, reference = tiny_llama(), tiny_llama()
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.05)
        before = weights(model)
        trainer = library.DPOTrainer(
            model=model,
            # ours refuses what nothing reads
            ref_model=None if library is fastdpo and objective.get("loss_type") == "sft" else reference,
            args=library.DPOConfig(
                output_dir=str(tmp_path / name),
                **{"learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0},
                **{"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "beta": 0.3},
                **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False},
                **{"bf16": False, "use_cpu": True},
                **objective,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=byte_tokenizer(),
        )
        trainer.train()
        logged[name], moved[name] = trainer.state.log_history[0], weights(model) - before
    assert logged["fastdpo"]["loss"] == pytest.approx(logged["trl"]["loss"], rel=1e-5, abs=1e-6)
    unread = {"rewards/chosen", "rewards/rejected", "rewards/margins"} if objective.get("loss_type") == "sft" else set()
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "grad_norm"):
        if metric not in unread and metric in logged["trl"]:
            assert logged["fastdpo"][metric] == pytest.approx(logged["trl"][metric], rel=2e-4, abs=2e-5), metric
    assert moved["trl"].norm() > 1e-4
    assert (moved["fastdpo"] - moved["trl"]).norm() < 1e-4 * moved["trl"].norm()
