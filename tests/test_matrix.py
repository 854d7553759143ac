"""Train, log, evaluate, save, reload and score, over dtypes, adapters, objectives and ways to compute the head.

Each cell is compared with plain PyTorch: the stock model's whole logits, trained by the same steps, in the cell's
dtype and in float64. How far the dtype takes plain PyTorch from float64 bounds how far it may take the cell. The model
is sure of most next tokens, so a backward that skips cells finds some; on a random head it would fall back to `exact`.
"""

import copy
import functools
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from matplotlib.figure import Figure
from torch import Tensor

import fastdpo
from fastdpo import cli
from fastdpo.head.impl import sparsity
from fastdpo.head.impl.cells import Cells
from fastdpo.kernels import linear_logprobs_backward, linear_logprobs_forward
from fastdpo.kernels.logits_tile import Config
from fastdpo.loss.batch_loss import compute, step_mean
from fastdpo.loss.options import from_config, kind_of_loss
from fastdpo.loss.whole_step import step_totals
from tests.helpers.trainers import NoTokenizer

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
VOCAB = 1024  # 16 cells of the PyTorch head, 8 of the Triton kernels'
BETA = 0.1
STEPS = 3
LEARNING_RATE = {"full": 0.05, "lora": 0.5}

VALUES = (
    ("float32", "bfloat16", "autocast", "float16"),  # dtype of the weights, or bf16=True over float32 weights
    ("full", "lora"),
    ("sigmoid", "kto", "plackett_luce", "orpo"),
    ("exact", "auto", "sparse"),
    ("torch", "eager", "triton"),
)


class Cell(NamedTuple):
    """One run."""

    dtype: str
    adapter: str
    loss_type: str
    backward: str
    impl: str

    @property
    def weights(self) -> torch.dtype:
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    @property
    def skips(self) -> bool:
        """Whether its backward leaves cells out."""
        return self.impl != "eager" and (
            self.backward == "sparse" or (self.backward == "auto" and self.dtype != "float32")
        )


CELLS = [
    Cell(*words.split())
    for words in (
        "float32 full kto sparse triton",
        "float32 full orpo auto torch",
        "float32 lora sigmoid exact eager",
        "float32 lora plackett_luce sparse torch",
        "bfloat16 full kto auto torch",
        "bfloat16 full plackett_luce auto eager",
        "bfloat16 lora sigmoid sparse torch",
        "bfloat16 lora orpo exact triton",
        "autocast full sigmoid auto triton",
        "autocast full orpo sparse torch",
        "autocast lora kto exact eager",
        "autocast lora plackett_luce auto torch",
        "float16 full sigmoid sparse torch",
        "float16 full plackett_luce exact torch",
        "float16 full plackett_luce exact triton",
        "float16 lora kto auto torch",
        "float16 lora orpo sparse eager",
    )
]


def test_every_two_values_meet_in_a_cell() -> None:
    """And the PyTorch head skips cells in every dtype, with and without the weight's gradient."""
    for (i, left), (j, right) in itertools.combinations(enumerate(VALUES), 2):
        met = {(cell[i], cell[j]) for cell in CELLS}
        assert met == set(itertools.product(left, right))
    met = {(cell.dtype, cell.backward) for cell in CELLS if cell.impl == "torch"}
    assert met >= set(itertools.product(VALUES[0], ("auto", "sparse")))


# The model and its data


@functools.cache
def peaked_llama() -> Any:
    """A model in float32 that counts: the head's row of a token answers to the embedding of the token before it.

    All weights are numbers of bfloat16 and of float16, so every dtype starts from the same model.
    """
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.copy_(0.8 * embeddings.roll(1, 0))
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().where(parameter.abs() > 2.0**-6, 0.0))
    return model


def make_model(dtype: torch.dtype) -> Any:
    return copy.deepcopy(peaked_llama()).to(dtype)


def make_rows(loss_type: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Chosen responses count on from the prompt; rejected ones are noise."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    rows: list[dict[str, Any]] = []
    for i in range(n):
        start, lengths = draw(3, VOCAB - 40), (draw(2, 9), draw(3, 9), draw(2, 9), draw(2, 9))
        prompt = [1, *range(start, start + lengths[0])]
        chosen = [*range(start + lengths[0], start + sum(lengths[:2])), 2]
        first, second = ([draw(3, VOCAB) for _ in range(length)] + [2] for length in lengths[2:])
        kind = kind_of_loss(loss_type)
        if kind == "ranked":
            rows.append({"prompt_ids": prompt, "ranked_ids": [chosen, first, *[second] * (i % 2)]})
        elif kind == "unpaired":
            rows.append({"prompt_ids": prompt, "completion_ids": first if i % 2 else chosen, "label": i % 2 == 0})
        else:
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": first})
    return rows


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


# Plain PyTorch


def stock_logps(model: Any, batch: dict[str, Any], *, autocast: bool) -> Tensor:
    """`[M]` float32 or float64, from the stock model's logits of padded rows."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    rows = logits.flatten(0, 1)[batch["logit_index"]]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows.log_softmax(-1).gather(1, batch["target_ids"][:, None]).squeeze(1)


class Plain(NamedTuple):
    """A plain training loop: losses of its steps, and the first step's log-probs and their gradient, `[M]`."""

    losses: list[float]
    logps: Tensor
    dlogps: Tensor


def train_plainly(dtype: str, adapter: str, trainer: fastdpo.DPOTrainer) -> Plain:
    """The trainer's steps, by stochastic gradient descent on its rows; `dtype` may be float64."""
    weights = torch.float32 if dtype == "autocast" else getattr(torch, dtype)
    model, reference = make_model(weights), make_model(weights)
    if adapter == "lora":
        transformers.set_seed(trainer.args.seed)
        model = peft.get_peft_model(model, lora())
        if dtype == "float64":
            model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=trainer.args.learning_rate)
    settings = from_config(trainer.args)
    batch = fastdpo.shared_prefix_batch(list(trainer.train_dataset), layout="padded")
    autocast = dtype == "autocast"
    losses, first = [], None
    for _ in range(STEPS):
        logps = stock_logps(model, batch, autocast=autocast)
        with torch.no_grad():
            expected = stock_logps(reference, batch, autocast=autocast)
        loss = step_mean(compute(batch, logps, expected, settings), step_totals([batch]))
        dlogps, *gradients = torch.autograd.grad(loss, [logps, *trained], allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(loss.item())
        first = first or (logps.detach().double(), dlogps.double())
    assert first is not None
    return Plain(losses, *first)


@pytest.fixture(scope="module")
def plain() -> Any:
    """`train_plainly`, once for each of its first arguments and objective."""
    known: dict[tuple[str, str, str], Plain] = {}

    def plain(dtype: str, cell: Cell, trainer: fastdpo.DPOTrainer) -> Plain:
        key = dtype, cell.adapter, cell.loss_type
        if key not in known:
            known[key] = train_plainly(dtype, cell.adapter, trainer)
        return known[key]

    return plain


# The cells


def run(cell: Cell, out: Path) -> fastdpo.DPOTrainer:
    """Train, evaluate, save."""
    trainer = fastdpo.DPOTrainer(
        model=make_model(cell.weights),
        args=fastdpo.DPOConfig(
            output_dir=str(out),
            loss_type=cell.loss_type,
            beta=BETA,
            bf16=cell.dtype == "autocast",
            head_backward=cell.backward,
            head_impl="auto" if cell.impl == "torch" else cell.impl,  # what auto is on a CPU
            optim="sgd",
            learning_rate=LEARNING_RATE[cell.adapter],
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            max_steps=STEPS,
            logging_steps=1,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(make_rows(cell.loss_type, 6, seed=0)),
        eval_dataset=Dataset.from_list(make_rows(cell.loss_type, 4, seed=1)),
        processing_class=NoTokenizer(),
        peft_config=lora() if cell.adapter == "lora" else None,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_cell(cell: Cell, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipping = []
    for owner, name in ((sparsity, "spread_skipped"), (Cells, "skipped")):  # the PyTorch head's and the kernels'
        skipped = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, skipped=skipped: skipping.append(1) or skipped(*args))
    for module in (linear_logprobs_forward, linear_logprobs_backward):  # few programs: the interpreter is slow
        monkeypatch.setattr(module, "default_config", lambda *_: Config(128, 512, 32, 4, 2))
    trainer = run(cell, tmp_path)
    *steps, evaluated = (entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry)

    assert len(steps) == STEPS
    names = {f"{group}/{side}" for group in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    names |= {"loss", "rewards/margins", "entropy", "mean_token_accuracy"}
    names |= {"rewards/accuracies"} if cell.loss_type != "kto" else set()
    for entry in (*steps, {name.removeprefix("eval_"): value for name, value in evaluated.items()}):
        assert entry.keys() >= names
        assert all(math.isfinite(value) for value in entry.values())
    assert all(entry.keys() >= {"grad_norm", "learning_rate", "num_tokens"} for entry in steps)

    assert len(skipping) == (STEPS if cell.skips else 0)
    for entry in steps:
        assert ("head/density" in entry) == cell.skips
        assert entry.get("head/density", 0.0) < sparsity.DENSE

    check_losses(cell, [entry["loss"] for entry in steps], plain, trainer)
    check_saved(cell, trainer, evaluated, tmp_path)


def check_losses(cell: Cell, losses: list[float], plain: Any, trainer: fastdpo.DPOTrainer) -> None:
    """As near to float64 as plain PyTorch in this dtype; where its errors cancel, as near as if they did not."""
    same_dtype, exact = plain(cell.dtype, cell, trainer), plain("float64", cell, trainer)
    rounding = float(((same_dtype.logps - exact.logps) * exact.dlogps).abs().sum())
    assert abs(exact.losses[-1] - exact.losses[0]) > 0.005, "nothing was learnt"
    for loss, theirs, true in zip(losses, same_dtype.losses, exact.losses, strict=True):
        bound = 2 * (abs(theirs - true) + rounding) + 1e-6
        assert abs(loss - true) <= bound


def check_saved(cell: Cell, trainer: fastdpo.DPOTrainer, evaluated: dict[str, float], folder: Path) -> None:
    """The saved weights are the trained ones, and score as the trainer evaluated them."""
    base = make_model(cell.weights)
    if cell.adapter == "lora":
        model, reference = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder), None
        saved, trained = (peft.get_peft_model_state_dict(m) for m in (model, trainer.model))
        assert any(w.any() for name, w in trained.items() if "lora_B" in name)
    else:
        model, reference = transformers.AutoModelForCausalLM.from_pretrained(folder), base
        saved, trained = model.state_dict(), trainer.model.state_dict()
        assert {w.dtype for w in saved.values()} == {cell.weights}
        assert not torch.equal(trained["lm_head.weight"], base.lm_head.weight)
    assert saved.keys() == trained.keys()
    for name, weight in trained.items():
        assert saved[name].dtype == weight.dtype, name
        assert torch.equal(saved[name], weight), name

    autocast = cell.dtype == "autocast"
    rows = list(trainer.eval_dataset)
    batch = fastdpo.shared_prefix_batch(rows, layout="padded")
    model.eval()
    errors = []
    for each in (model, base):
        with torch.no_grad():
            exact = stock_logps(copy.deepcopy(each).double(), batch, autocast=False)
            error = stock_logps(each, batch, autocast=autocast) - exact
        sums = (torch.segment_reduce(x, "sum", offsets=batch["cu_target"]) for x in (error, exact))
        errors.append(
            max(float(e.abs() + torch.finfo(torch.float32).eps * x.abs()) for e, x in zip(*sums, strict=True))
        )
    scores = fastdpo.score(
        model,
        reference,
        make_rows(cell.loss_type, 4, seed=1),
        tokenizer=NoTokenizer(),
        beta=BETA,
        autocast=torch.bfloat16 if autocast else None,
        disable_tqdm=True,
    ).rows
    rounding = {"logps": 2 * errors[0], "rewards": 2 * BETA * sum(errors)}
    for quantity, bound in rounding.items():
        if quantity == "rewards" and cell.loss_type == "orpo":
            continue  # its rewards are of the policy alone
        for side, expected in sides(scores, rows, quantity).items():
            assert evaluated[f"eval_{quantity}/{side}"] == pytest.approx(expected, abs=bound), (quantity, side)


def sides(scores: list[dict[str, Any]], rows: list[dict[str, Any]], quantity: str) -> dict[str, float]:
    """Means of a score's entry over chosen and over rejected responses, as training counts them."""
    values = [row[quantity] for row in scores]
    if "label" in rows[0]:
        sides = [
            [v[0] for v, row in zip(values, rows, strict=True) if row["label"] == label] for label in (True, False)
        ]
    else:
        sides = [[v[0] for v in values], [sum(v[1:]) / len(v[1:]) for v in values]]
    return {name: sum(side) / len(side) for name, side in zip(("chosen", "rejected"), sides, strict=True)}


# The quickstart


WORDS = [("--bf16", "true"), ("--use_peft", "true"), ("--head_backward", "sparse")]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_the_quickstart_trains_logs_and_saves(
    words: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a few of its rows, by the command."""
    caplog.set_level(logging.INFO, "fastdpo")  # as the command sets it, but not for the tests that follow
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"png"))  # it takes longest
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for split in ("train", "test"):
        lines = (QUICKSTART / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{split}.jsonl").write_text("".join(lines[:24]))
    given = {"config_name": QUICKSTART / "model", "dataset_name": data, "output_dir": out, "use_cpu": "true"}
    given |= {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 8}
    cli.main(["train", f"{QUICKSTART}.yaml", *(f"--{name}={value}" for name, value in given.items()), *words])

    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    steps, evaluated = ([entry for entry in history if name in entry] for name in ("loss", "eval_loss"))
    assert len(steps) == 3
    assert all(math.isfinite(value) for entry in (*steps, *evaluated) for value in entry.values())
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are rounded alike
    assert abs(steps[2]["loss"] - math.log(2)) > 1e-5, "the weights have not moved"
    assert evaluated[0]["eval_rewards/accuracies"] == 0.5
    assert ("head/density" in steps[0]) == ("--use_peft" not in words)
    assert "held out" in capsys.readouterr().out
    base = transformers.AutoConfig.from_pretrained(QUICKSTART / "model")
    if "--use_peft" in words:
        start = transformers.AutoModelForCausalLM.from_config(base)
        model: Any = peft.PeftModel.from_pretrained(start, out)
        trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        trained = list(model.parameters())
    assert all(p.dtype == torch.float32 and p.any() for p in trained)
