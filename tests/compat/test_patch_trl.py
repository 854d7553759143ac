"""patch_trl(): TRL's trainers give what they give without it, and never compute logits.

Runs with every release of TRL that patch_trl knows, see noxfile.py.
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import copy
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, set_seed

import fastdpo
from fastdpo.compat import patch_trl
from fastdpo.compat.lazy import call, heads, logits
from fastdpo.head import eager
from fastdpo.head.linear_logprobs import linear_logprobs, linear_logprobs_with_stats
from tests.helpers.accuracy import assert_as_accurate
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.no_logits import NoLogits
from tests.helpers.tiny import make_model
from tests.helpers.trainers import tiny_llama, weights

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' releases of several years

VERSION = tuple(int(part) for part in trl.__version__.split(".")[:2])
STEPS = 2
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


def make(kind: str, folder: Path, model: nn.Module, ref_model: nn.Module | None = None, **settings: Any) -> Any:
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
        options["ref_model"] = ref_model or (None if hasattr(model, "peft_config") else copy.deepcopy(model))
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


def assert_as_accurate_as_trl(
    folder: Path, load: Callable[[torch.dtype], Any], kind: str = "DPO", **settings: Any
) -> None:
    """Train without and with patch_trl, and in float64; ours may be twice as far from float64 as TRL's is."""

    def run(dtype: torch.dtype) -> Any:
        return train(make(kind, folder, load(dtype), **settings))

    theirs = run(torch.float32)
    fastdpo.patch_trl()
    ours, exact = run(torch.float32), run(torch.float64)
    assert_same_metrics(ours[1], theirs[1])
    for our, their, truth in zip(ours[0], theirs[0], exact[0], strict=True):
        assert abs(our - truth) <= 2 * abs(their - truth) + 1e-6 * (1 + abs(truth))
    before = weights(load(torch.float32))
    if before.shape == exact[2].shape:  # no adapters
        assert (exact[2] - before).norm() > 1e-3
    error, bar = (ours[2] - exact[2]).norm(), (theirs[2] - exact[2]).norm()
    assert error <= 2 * bar + 1e-6 * exact[2].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_gives_what_it_gives_without(kind: str, start: Path, tmp_path: Path) -> None:
    assert_as_accurate_as_trl(tmp_path, lambda dtype: load(start, dtype), kind)


@pytest.mark.parametrize("family", ["phi", "gemma2", "cohere"], ids=["bias", "soft-cap", "logit-scale"])
@pytest.mark.parametrize("kind", ["DPO", "SFT", "GRPO"])
def test_heads_of_all_kinds(kind: str, family: str, tmp_path: Path) -> None:
    if (kind, family) == ("GRPO", "gemma2"):
        pytest.skip("in float64, Gemma 2 generates from NaN, with and without patch_trl")
    settings = {"beta": 0.0} if kind == "GRPO" else {}  # else it loads a reference from a folder
    assert_as_accurate_as_trl(tmp_path, lambda dtype: make_model(family, vocab_size=300).to(dtype), kind, **settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DPO", {"use_weighting": True}),
        ("DPO", {"rpo_alpha": 0.5}),
        ("SFT", {"loss_type": "nll"}),
        ("SFT", {"loss_type": "dft"}),
    ],
    ids=str,
)
def test_settings_that_read_logits_in_other_ways(
    kind: str, settings: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    names = {f.name for f in fields(getattr(trl, f"{kind}Config"))}
    if not set(settings) <= names:
        pytest.skip("not a setting of this release")
    assert_as_accurate_as_trl(tmp_path, lambda dtype: load(start, dtype), kind, **settings)


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_adapters(kind: str, start: Path, tmp_path: Path) -> None:
    """The reference is the model without its adapter; the head has one too where TRL allows it."""
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "lm_head"] if VERSION < (1, 13) else ["q_proj"]

    def with_adapter(dtype: torch.dtype) -> Any:
        set_seed(5)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules, init_lora_weights="gaussian")
        model = peft.get_peft_model(load(start), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(dtype)

    assert_as_accurate_as_trl(tmp_path, with_adapter, kind)


def test_16_bit_heads_are_not_rounded() -> None:
    """Logits in bfloat16 cost the model two digits of a log-prob, which the head keeps."""
    model = tiny_llama(vocab_size=300).bfloat16()
    ids, targets = torch.randint(3, 300, (2, 9)), torch.randint(300, (2, 9))
    with heads.lazy_heads([model]):
        ours = logits_to_logps(model(input_ids=ids).logits, targets)
    theirs = logits_to_logps(model(input_ids=ids).logits.float(), targets)
    hidden = model.model(input_ids=ids).last_hidden_state
    exact = logits_to_logps(hidden.double() @ model.lm_head.weight.double().T, targets)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 0.05 * (theirs - exact).norm()


def logits_to_logps(logits: Any, targets: Tensor) -> Any:
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_never_exist(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step allocates nothing that has as many elements as the logits of the scored tokens, but for the workspace."""
    V = 4000
    for module in (call, patch_trl):
        for op in (linear_logprobs, linear_logprobs_with_stats):
            if hasattr(module, op.__name__):
                monkeypatch.setattr(module, op.__name__, partial(op, workspace_bytes=2**20))
    monkeypatch.setattr(logits, "CHUNK_BYTES", 2**17)
    tiny_llama(vocab_size=V, hidden_size=16).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rows = {"DPO": 8 * 10, "KTO": 4 * 10, "SFT": 4 * 20, "GRPO": 8 * 12, "RLOO": 8 * 12}[kind]
    settings = {"max_completion_length": 12, "per_device_train_batch_size": 8} if kind in ("GRPO", "RLOO") else {}
    trainer = make(kind, tmp_path, model, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer_and_scheduler(2)
    trainer.current_gradient_accumulation_steps = 1
    assert rows * V > 2 * model.lm_head.weight.numel(), "the batch is too small to tell logits from weights"
    with pytest.raises(AssertionError), NoLogits(rows * V):  # the mode bites
        trainer.training_step(trainer.model, copy.copy(batch), None)
    fastdpo.patch_trl()
    trainer._step = 0
    with NoLogits(rows * V):
        trainer.training_step(trainer.model, copy.copy(batch), None)


def names_of_trl() -> dict[tuple[str, str], int]:
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "trl"}
    names = {(m, name): id(value) for m, module in modules.items() for name, value in vars(module).items()}
    for cls, name in (*patch_trl._methods(), (Trainer, "training_step")):
        names[cls.__qualname__, name] = id(vars(cls)[name])
    return names


def test_unpatch_restores_every_name(start: Path, tmp_path: Path) -> None:
    trainer = make("DPO", tmp_path, load(start), max_steps=1)
    make("GRPO", tmp_path, load(start))  # has all modules imported
    patch_trl._import_trainers()
    before = names_of_trl()
    fastdpo.patch_trl()
    patched = names_of_trl()
    assert patched != before
    fastdpo.patch_trl()
    assert names_of_trl() == patched
    loss = train(trainer)[0][0]  # it was made before
    fastdpo.unpatch_trl()
    assert names_of_trl() == before
    fastdpo.unpatch_trl()
    assert names_of_trl() == before
    assert loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("found", ["0.23.1", "1.17.0", "2.0.0.dev0"])
def test_an_unknown_release_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_trl, "version", lambda _: found)
    with pytest.raises(ImportError, match=rf"knows TRL 0.24 to 1.16, and found {found}"):
        fastdpo.patch_trl()


def test_without_trl_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(patch_trl, "version", version)
    with pytest.raises(ImportError, match=r"fastdpo.patch_trl\(\) needs TRL: pip install 'fastdpo\[trl\]'"):
        fastdpo.patch_trl()


def test_a_release_without_the_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_trl._import_trainers()
    before = names_of_trl()
    monkeypatch.setattr(patch_trl, "_replace_everywhere", lambda *_: [])
    with pytest.raises(
        ImportError, match=r"found neither trl.kernels.*ChunkedLogProbFunction nor .*selective_log_soft"
    ):
        fastdpo.patch_trl()
    assert names_of_trl() == before


@pytest.mark.skipif(VERSION >= (1, 15), reason="this release never asks for logits")
def test_a_trainer_derived_from_trls_is_served(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it overrides `compute_loss`, and was defined before TRL was patched."""
    asked = []

    class Derived(trl.DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            x = model(input_ids=next(v for v in inputs.values() if v.ndim == 2)).logits
            asked.append(type(x))
            return x.log_softmax(-1).gather(-1, torch.zeros_like(x.rows)[..., None]).mean()

    monkeypatch.setattr(trl, "DPOTrainer", Derived)
    trainer = make("DPO", tmp_path, load(start), max_steps=1)
    fastdpo.patch_trl()
    train(trainer)
    assert asked == [logits.LazyLogits]


@pytest.mark.skipif(VERSION >= (1, 15), reason="this release never asks for logits")
def test_a_head_that_cannot_be_fused_is_left_to_trl(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hooked(dtype: torch.dtype) -> Any:
        model = load(start, dtype)
        model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
        return model

    caplog.set_level(logging.WARNING, "fastdpo")
    assert_as_accurate_as_trl(tmp_path, hooked)
    lines = [r.message for r in caplog.records if "patch_trl" in r.message]
    assert lines == [
        "patch_trl: the logits of LlamaForCausalLM are computed as before, because its output embeddings have hooks"
    ]


@pytest.mark.skipif(VERSION < (1, 14), reason="TRL's function has these arguments since 1.14")
@pytest.mark.parametrize("options", [(1.0, None, 1.0), (0.7, None, 0.25), (1.3, 3.0, 2.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_trls_function_with_all_outputs_and_gradients(options: tuple[float, float | None, float], bias: bool) -> None:
    """Log-probs, entropy, the gradients of both, and the statistics, against float64; TRL's own errors are the bar."""
    utils = trl.trainer.utils
    theirs = utils._ChunkedLogProbFunction
    fastdpo.patch_trl()
    ours = utils._ChunkedLogProbFunction
    assert ours is not theirs
    temperature, softcap, scale = options
    g = torch.Generator().manual_seed(1)
    N, D, V = 37, 24, 1051
    inputs = [torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)]
    inputs += [torch.randn(V, generator=g)] if bias else []
    targets = torch.randint(V, (N,), generator=g)
    upstream = torch.randn(2, N, generator=g)

    def run(apply: Any, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        found = apply(*leaves[:2], leaves[2] if bias else None, targets, temperature, 512, softcap, scale)
        logps, entropy, *others = found
        (upstream.to(dtype) * torch.stack([logps, entropy])).sum().backward()
        return [logps.detach(), entropy.detach(), *(x.grad for x in leaves), *others[:2]], others[2:]

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
        logps, _, stats = eager.linear_logprobs(hidden, weight, targets, bias, scale, softcap, temperature, stats=True)
        return logps, stats.entropy, stats.log_sum_sq_probs.detach(), stats.mean_logits.detach(), stats.is_top1

    exact, top1 = run(plain, torch.float64)
    reference, _ = run(theirs.apply, torch.float32)
    result, ours_top1 = run(ours.apply, torch.float32)
    assert len(result) == len(reference)
    names = ["logps", "entropy", "dhidden", "dweight", *(["dbias"] if bias else []), "log_sum_sq_probs", "mean_logits"]
    for name, x, bar, truth in zip(names, result, reference, exact, strict=False):
        assert_as_accurate(x, bar, truth, name)
    if VERSION < (1, 15):
        return
    assert torch.equal(ours_top1[0], top1[0])
    leaves = inputs[0], inputs[1], inputs[2] if bias else None
    alone = ours.apply(*leaves, targets, temperature, 512, softcap, scale, ("log_probs",))[0]
    torch.testing.assert_close(alone, result[0])


@pytest.mark.skipif(VERSION < (1, 15), reason="TRL's function has these outputs since 1.15")
def test_outputs_not_asked_for_are_none_and_a_call_that_cannot_be_served_is_trls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from trl.kernels import chunked_logprob

    theirs = chunked_logprob.ChunkedLogProbFunction
    fastdpo.patch_trl()
    apply = chunked_logprob.ChunkedLogProbFunction.apply
    hidden, weight, targets = torch.randn(3, 8), torch.randn(11, 8), torch.tensor([1, 0, 10])
    assert [x is None for x in apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ("log_probs",))] == [False] + [
        True
    ] * 4
    some = apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ("entropy", "is_top1"))
    assert [x is None for x in some] == [False, False, True, True, False]
    assert apply(hidden[:0], weight, None, targets[:0], 1.0, 8)[0].shape == (0,)
    caplog.set_level(logging.WARNING, "fastdpo")
    for _ in range(2):
        mixed = apply(hidden, weight.bfloat16(), None, targets, 1.0, 8)
    torch.testing.assert_close(mixed, theirs.apply(hidden, weight.bfloat16(), None, targets, 1.0, 8))
    lines = [r.message for r in caplog.records if "patch_trl" in r.message]
    assert len(lines) == 1
    assert "differ in dtype" in lines[0]


# The stand-in for logits

EXPRESSIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "shifted": lambda x, t: x[:, :-1, :].log_softmax(-1).gather(-1, t[:, 1:, None]).squeeze(-1),
    "ellipsis": lambda x, t: torch.gather((x[..., 1:, :] / 0.7).log_softmax(-1), dim=2, index=t[:, 1:, None]),
    "cross-entropy": lambda x, t: F.cross_entropy(x.to(x.dtype).view(-1, x.size(-1)), t.where(t > 3, -100).view(-1)),
    "summed": lambda x, t: F.cross_entropy(x.flatten(end_dim=1), t.flatten(), reduction="sum"),
    "module": lambda x, t: nn.CrossEntropyLoss(ignore_index=2)(x.reshape(-1, x.shape[-1]), t.reshape(-1)),
    "soft-capped": lambda x, t: 3.0 * (torch.tanh(x / 2.0) * 4.0)[:, ::2].log_softmax(-1).gather(-1, t[:, ::2, None]),
    "rows": lambda x, t: torch.stack(
        [F.log_softmax(r, dim=-1).gather(-1, i[:, None]) for r, i in zip(x, t, strict=True)]
    ),
    "masked": lambda x, t: x[t > 3].mean(),
    "means": lambda x, t: x.chunk(2, dim=0)[1].contiguous().mean(-1),
    "capped-means": lambda x, t: (x / 3).tanh().index_select(0, torch.tensor([1])).nansum(),
    "wpo": lambda x, t: torch.logsumexp(2 * F.log_softmax(x, dim=-1), dim=-1),
    "lse": lambda x, t: torch.logsumexp(2.0 * x, dim=-1),
    "in-place": lambda x, t: x[:, 1:].div_(0.3).log_softmax(-1).gather(-1, t[:, 1:, None]),
    "tokens": lambda x, t: x[:, :, 2:7].sum(),
    "other": lambda x, t: (x.softmax(-1) * x).sum(-1) - x[0].std() + (x + 1).exp().sum(),
}


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
@pytest.mark.parametrize("detached", [False, True], ids=["trained", "detached"])
def test_lazy_logits_answer_as_logits_do(expression: Callable[..., Any], detached: bool) -> None:
    """Values and gradients of expressions that trainers compute from logits, in float64."""
    model = tiny_llama(vocab_size=53).double()
    ids = torch.randint(3, 53, (2, 9))
    targets = torch.randint(53, (2, 9))
    found = []
    for lazy in (False, True):
        model.zero_grad()
        with heads.lazy_heads([model] if lazy else []):
            x = model(input_ids=ids).logits
        assert isinstance(x, logits.LazyLogits) is lazy
        assert x.shape == (2, 9, 53)
        result = expression(x.detach() if detached else x, targets)
        assert result.requires_grad is not detached
        if not detached:
            (result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)).sum().backward()
        found.append([result.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", patch_trl.OF_LOGITS)
def test_trls_functions_of_logits_take_the_stand_in(name: str) -> None:
    """With each option that the release has; a row that is masked out has log-prob and entropy 0."""
    original = getattr(trl.trainer.utils, name, None)
    if original is None:
        pytest.skip("not a function of this release")
    model = tiny_llama(vocab_size=53).double()
    ids, targets = torch.randint(3, 53, (2, 9)), torch.randint(53, (2, 9))
    given = {"temperature": 0.7, "row_mask": (targets % 3 > 0).int()}
    given = {option: value for option, value in given.items() if option in inspect.signature(original).parameters}
    with heads.lazy_heads([model]):
        x = model(input_ids=ids).logits
    positional = () if name == "entropy_from_logits" else (targets,)
    ours = patch_trl._of_lazy_logits(name, original)(x, *positional, **given)
    theirs = original(model(input_ids=ids).logits, *positional, **given)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_lazy_logits_say_once_why_logits_are_computed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "fastdpo")
    model = tiny_llama(vocab_size=53)
    with heads.lazy_heads([model]), heads.lazy_heads([model]):
        x = model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits
    assert type(model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits) is Tensor
    x.softmax(-1), x.softmax(-1), x.argmax(-1)
    assert [r.message for r in caplog.records] == [
        "patch_trl: logits are computed as before, because they are given to softmax, which fastdpo's head cannot serve"
    ]
    x[:, 1:].mul_(2.0)
    with pytest.raises(RuntimeError, match="of which a view was changed in place"):
        x.mean()
    with pytest.raises(RuntimeError, match="add_ changes logits in place"):
        x.add_(1)
