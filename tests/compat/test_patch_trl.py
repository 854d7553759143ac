"""patch_trl(): TRL's trainers give what they give without it, and never compute logits.

Runs with every release of TRL that patch_trl knows, see noxfile.py.
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, set_seed

import fastdpo
from fastdpo.compat import patch_trl
from fastdpo.compat.lazy import heads, logits
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.trainers import tiny_llama, weights

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' releases of several years

STEPS = 3
KINDS = ["DPO", "KTO", "SFT", "GRPO", "RLOO"]
PAIRS = [
    {"prompt": f"Count from {i}:", "chosen": f" {i} {i + 1} {i + 2}", "rejected": " " + "no " * (i % 5 + 1)}
    for i in range(12)
]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    patch_trl._say_refused.cache_clear()
    heads._say_refused.cache_clear()
    logits._say_realised.cache_clear()
    fastdpo.unpatch_trl()
    yield
    fastdpo.unpatch_trl()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model: TRL loads the reference from where the model came from."""
    folder = tmp_path_factory.mktemp("start")
    tiny_llama(vocab_size=300).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).to(dtype)


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(map(ord, str(text))) % 7) for text in completions]


def make(kind: str, folder: Path, model: nn.Module, **settings: Any) -> Any:
    """A trainer of TRL's that takes STEPS steps of gradient descent."""
    data = PAIRS
    options: dict[str, Any] = {}
    if kind == "KTO":
        data = [
            {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
            for i, p in enumerate(PAIRS)
        ]
    elif kind == "SFT":
        data = [{"text": p["prompt"] + p["chosen"]} for p in PAIRS]
    elif kind in ("GRPO", "RLOO"):
        data = [{"prompt": p["prompt"]} for p in PAIRS]
        settings = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.8, "beta": 0.1} | settings
        options["reward_funcs"] = length_reward
    if kind in ("DPO", "KTO"):
        options["ref_model"] = copy.deepcopy(model)
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        **{"learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
        | {"per_device_train_batch_size": 4, "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no"}
        | {"report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False, "bf16": False}
        | {"use_cpu": True, "seed": 3}
        | settings,
    )
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # transformers 4 adds what models do not take
    trainer = getattr(trl, f"{kind}Trainer")
    return trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        **options,
    )


def train(trainer: Any) -> tuple[list[Tensor], list[dict[str, float]], Tensor]:
    """The loss of each step, what was logged, and the weights at the end."""
    losses = []
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        losses.append(step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = training_step
    set_seed(3)
    trainer.train()
    records = [r for r in trainer.state.log_history if "loss" in r]
    return losses, records, weights(trainer.model)


def assert_same_metrics(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) == STEPS
    for our, their in zip(ours, theirs, strict=True):
        assert set(our) == set(their)
        for name in set(our) - {"step_time", "epoch"}:
            assert our[name] == pytest.approx(their[name], rel=1e-4, abs=2e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_gives_what_it_gives_without(kind: str, start: Path, tmp_path: Path) -> None:
    """Losses and weights are at most twice as far from those in float64 as TRL's are."""
    theirs = train(make(kind, tmp_path, load(start)))
    fastdpo.patch_trl()
    ours = train(make(kind, tmp_path, load(start)))
    exact = train(make(kind, tmp_path, load(start, torch.float64)))
    assert_same_metrics(ours[1], theirs[1])
    for our, their, truth in zip(ours[0], theirs[0], exact[0], strict=True):
        assert abs(our - truth) <= 2 * abs(their - truth) + 1e-6 * (1 + abs(truth))
    moved = (exact[2] - weights(load(start))).norm()
    assert moved > 1e-3
    error, bar = (ours[2] - exact[2]).norm(), (theirs[2] - exact[2]).norm()
    assert error <= 2 * bar + 1e-6 * exact[2].norm()
    assert error < 1e-2 * moved
