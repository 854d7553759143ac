"""What TRL 1.16's DPO trainer gets silently wrong or breaks on, end to end: here it is right, or it is refused by name.

Formulas alone are held in tests/loss/test_objectives.py; this file goes through DPOConfig, dataset, trainer and its
log.
"""

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import fastdpo
from fastdpo.data import prepare
from fastdpo.model.scoring_forward import find_head
from tests.helpers.byte_tokenizer import VOCAB as BYTES
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny import PAIRS, VOCAB, make_model, make_pairs, stock, stock_logps

BETA = 0.3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., fastdpo.DPOTrainer]:
    def make(model: Any, rows: list[dict[str, Any]] = PAIRS, ref_model: Any = None, **args: Any) -> fastdpo.DPOTrainer:
        eval_rows = args.pop("eval_rows", None)
        settings = {
            "output_dir": str(tmp_path / "out"),
            "beta": BETA,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": len(PAIRS),
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "use_cpu": True,
        }
        return fastdpo.DPOTrainer(
            model,
            ref_model=ref_model,
            args=fastdpo.DPOConfig(**settings | args),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=eval_rows and Dataset.from_list(eval_rows),
            processing_class=tokenizer,
        )

    return make


def first_log(trainer: fastdpo.DPOTrainer) -> dict[str, float]:
    trainer.train()
    return trainer.state.log_history[0]


def sequence_logps(model: nn.Module, pairs: list[dict[str, list[int]]] = PAIRS) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of `pairs`, [B] each: every sequence alone, stock forward."""
    lengths = [len(pair[name]) for name in ("chosen_ids", "rejected_ids") for pair in pairs]
    with torch.no_grad():
        logps = stock_logps(model, pairs).double()
    sums = torch.stack([part.sum() for part in logps.split(lengths)])
    return sums[: len(pairs)], sums[len(pairs) :]


# label_smoothing, which TRL's `sigmoid` ignores


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 0.45])
def test_label_smoothing_reaches_the_loss(make: Callable[..., Any], label_smoothing: float) -> None:
    """Eq. 3 of https://ericmitchell.ai/cdpo.pdf, of the stock model's log-probs in float64."""
    policy, reference = make_model("llama"), make_model("llama", rms_norm_eps=0.3)
    (chosen, rejected), (ref_chosen, ref_rejected) = map(sequence_logps, (stock(policy), stock(reference)))
    z = BETA * (chosen - ref_chosen - rejected + ref_rejected)
    assert z.abs().max() > 0.5
    e = label_smoothing
    expected = ((1 - e) * torch.log1p(torch.exp(-z)) + e * torch.log1p(torch.exp(z))).mean().item()
    logged = first_log(make(policy, ref_model=reference, label_smoothing=label_smoothing))["loss"]
    assert logged == pytest.approx(expected, abs=1e-5)


# Rows that TRL drops without a word


ROWS = [
    {"prompt": "a prompt that alone fills it", "chosen": "b", "rejected": "c"},
    {"prompt": "ab", "chosen": "abcdefgh", "rejected": "abcdefxy"},  # alike up to max_length
    {"prompt": "ab", "chosen": "c", "rejected": "d"},
    {"prompt": "ab", "chosen": "e", "rejected": "fgh"},
]


def test_dropped_rows_are_counted_and_named(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """In both datasets; what is left trains, with the numbers of the rows it came from."""
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        trainer = make(make_model("llama", vocab_size=BYTES), ROWS, max_length=9, eval_rows=ROWS[::2])
    assert "train dataset: dropped 2 useless rows of 4" in caplog.text
    assert "row 0: its prompt of 29 tokens fills max_length=9" in caplog.text
    assert "row 1: chosen and rejected are the same tokens" in caplog.text
    assert "eval dataset: dropped 1 useless rows of 2" in caplog.text
    assert next(iter(trainer.get_train_dataloader()))["pair_index"].sort().values.tolist() == [2, 3]
    trainer.train()


def test_a_dataset_of_prompts_that_are_all_too_long_is_an_error(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="train dataset has no usable row left out of 1"):
        make(make_model("llama", vocab_size=BYTES), ROWS[:1], max_length=9)


def test_a_negative_max_length_is_an_error_and_not_an_empty_dataset(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"max_length must be at least 2 .*, got -1"):
        make(make_model("llama", vocab_size=BYTES), ROWS, max_length=-1)


def test_a_prompt_without_tokens_is_named() -> None:
    """TRL would never score the completion's first token."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # adds no BOS
    problem = prepare.tokenize_row({"prompt": "", "chosen": "a", "rejected": "b"}, 0, tokenizer, None, BYTES)["problem"]
    assert "`prompt` has no tokens, so nothing predicts the first token of the completions" in problem


def test_a_tokenizer_that_ends_texts_itself_leaves_one_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL's completions end with two, and prompts end with one."""
    ending = byte_tokenizer()
    ending.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    row = {"prompt": "ab", "chosen": "c", "rejected": "de"}
    ours, plain = (prepare.tokenize_row(row, 0, tok, None, BYTES) for tok in (ending, tokenizer))
    assert {name: ours[name] for name in prepare.TOKEN_COLUMNS["preference"]} == {
        name: plain[name] for name in prepare.TOKEN_COLUMNS["preference"]
    }


# Divergence, which TRL logs as a loss of 0.0


def test_weights_that_overflow_stop_the_run(make: Callable[..., Any]) -> None:
    """The first update takes weights beyond float32, so the second loss is no number, whatever the arithmetic."""
    trainer = make(make_model("llama"), beta=30.0, optim="sgd", learning_rate=3e38, max_grad_norm=0.0, max_steps=6)
    with pytest.raises(FloatingPointError, match=r"the loss of dataset rows \[.*\] is not finite"):
        trainer.train()
    assert not all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(math.log(2), abs=1e-6)]


class Blowup(transformers.TrainerCallback):
    """Multiplies the head's weight after every step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].lm_head.weight.mul_(4.0)


def test_a_diverging_loss_is_logged_as_it_is(make: Callable[..., Any]) -> None:
    """Each pair is there in both orders, so the loss grows with the margin whichever way the weights go."""
    swapped = [pair | {"chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]} for pair in PAIRS]
    policy = make_model("llama")
    trainer = make(
        copy.deepcopy(policy), PAIRS + swapped, per_device_train_batch_size=8, learning_rate=0.0, max_steps=4
    )
    trainer.add_callback(Blowup())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ref_margin = torch.sub(*sequence_logps(stock(policy)))
    for step, loss in enumerate(losses):
        diverged = stock(policy)
        with torch.no_grad():
            diverged.lm_head.weight.mul_(4.0**step)
        z = BETA * (torch.sub(*sequence_logps(diverged)) - ref_margin)
        assert loss == pytest.approx((F.softplus(z) + F.softplus(-z)).mean().item() / 2, rel=1e-4), step
    assert len(losses) == 4
    assert losses[-1] > 10


# Model classes whose log-probs TRL computes wrongly (all but the last three), or on which it crashes


def small(config: str, **options: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    return getattr(transformers, config)(**sizes | tokens | options)


DECODER = {"is_decoder": True}
LLAMA4 = {"intermediate_size_mlp": 48, "head_dim": 8, "num_key_value_heads": 2, "moe_layers": []}
INKLING = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 6,
    "rel_extent": 64,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["dense", "dense"],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertLMHeadModel": ("BertConfig", DECODER),
    "BigBirdForCausalLM": ("BigBirdConfig", {**DECODER, "attention_type": "original_full"}),
    "CamembertForCausalLM": ("CamembertConfig", DECODER),
    "Data2VecTextForCausalLM": ("Data2VecTextConfig", DECODER),
    "ElectraForCausalLM": ("ElectraConfig", DECODER),
    "ErnieForCausalLM": ("ErnieConfig", DECODER),
    "MegatronBertForCausalLM": ("MegatronBertConfig", DECODER),
    "ModernBertDecoderForCausalLM": ("ModernBertDecoderConfig", {"local_attention": 12}),
    "RecurrentGemmaForCausalLM": ("RecurrentGemmaConfig", {"attention_window_size": 16}),
    "InklingForCausalLM": ("InklingTextConfig", INKLING),
    "RoCBertForCausalLM": ("RoCBertConfig", DECODER),
    "RoFormerForCausalLM": ("RoFormerConfig", DECODER),
    "RobertaForCausalLM": ("RobertaConfig", DECODER),
    "RobertaPreLayerNormForCausalLM": ("RobertaPreLayerNormConfig", DECODER),
    "XLMRobertaForCausalLM": ("XLMRobertaConfig", DECODER),
    "XLMRobertaXLForCausalLM": ("XLMRobertaXLConfig", DECODER),
    "Llama4ForCausalLM": ("Llama4TextConfig", {**LLAMA4, "layer_types": ["full_attention"] * 2}),
    "MllamaForCausalLM": ("MllamaTextConfig", {"num_key_value_heads": 2, "cross_attention_layers": [1]}),
    "RemBertForCausalLM": ("RemBertConfig", DECODER),
}
MUST_RUN = MODELS.keys() - {"ElectraForCausalLM", "RemBertForCausalLM"}  # these two have an embedding in their head
LOOKED_AHEAD = {"BigBirdForCausalLM", "MegatronBertForCausalLM", "RemBertForCausalLM", "RoFormerForCausalLM"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_right_or_refused(name: str, make: Callable[..., Any]) -> None:
    config, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(small(config, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at 1 and 0, where mistakes don't show
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference = copy.deepcopy(model)
    refusal = ""
    try:
        trainer = make(model)
    except ValueError as error:
        refusal = str(error)
    if name in LOOKED_AHEAD and Version(transformers.__version__) < Version("5.23") and "it looks ahead" in refusal:
        pytest.skip(f"{name} of transformers {transformers.__version__} looks ahead, and is refused for that")
    if refusal:
        assert refusal.startswith(f"{name} cannot ")
        assert name not in MUST_RUN
        return
    logged = first_log(trainer)
    chosen, rejected = sequence_logps(reference)
    assert logged["logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-3)
    assert logged["logps/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-3)
    assert logged["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_softcap_by_its_other_name_is_read(make: Callable[..., Any]) -> None:
    """`logits_soft_cap`, which TRL doesn't know; on a model that takes it and can be packed."""
    model = make_model("gemma2", final_logit_softcapping=None)
    model.config.logits_soft_cap = 2.0
    assert find_head(model).softcap == 2.0


# A precomputed reference, which TRL keeps where it should not and forgets where it should keep it


MANY = make_pairs([(4 + i % 5, i % 3, 2 + i % 7, 1 + i % 4) for i in range(48)])


def loss_and_reference_tokens(make: Callable[..., Any], rows: list[dict[str, Any]], **args: Any) -> tuple[float, int]:
    """The first loss, and how many tokens the reference was asked for."""
    policy, reference = make_model("llama"), make_model("llama", rms_norm_eps=0.3)
    asked = []

    def count(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        asked.append(inputs["input_ids"].numel())

    reference.register_forward_pre_hook(count, with_kwargs=True)
    loss = first_log(make(policy, rows, ref_model=reference, **{"max_length": None} | args))["loss"]
    return loss, sum(asked)


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 5e-4}, {"beta": 0.7}, {"label_smoothing": 0.1}, {"seed": 5}],
    ids=lambda c: next(iter(c)),
)
def test_a_setting_that_the_reference_does_not_depend_on_computes_it_once(
    make: Callable[..., Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    """But for the few rows by which the cache is checked; and the loss is that of computing it."""
    cached = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    first = loss_and_reference_tokens(make, MANY, **cached)[1]
    loss, again = loss_and_reference_tokens(make, MANY, **cached, **change)
    assert again < first / 2  # what is left are the checks at the start
    assert loss == pytest.approx(loss_and_reference_tokens(make, MANY, **change)[0], abs=1e-6)


@pytest.mark.parametrize("change", [{"ld_alpha": 0.5}, {"max_length": 12}], ids=lambda c: next(iter(c)))
def test_a_setting_that_changes_the_references_numbers_finds_no_stale_ones(
    make: Callable[..., Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    cached = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    before = loss_and_reference_tokens(make, MANY, **cached)[0]
    after = loss_and_reference_tokens(make, MANY, **cached, **change)[0]
    online = loss_and_reference_tokens(make, MANY, **change)[0]
    assert abs(online - before) > 1e-3
    assert after == pytest.approx(online, abs=1e-6)


# Objectives on which TRL crashes or that it degrades


@pytest.mark.parametrize("loss_type", ["hinge", "sft"])
def test_weighting_trains_where_trl_crashes(make: Callable[..., Any], loss_type: str) -> None:
    model = make_model("llama")
    before = model.lm_head.weight.detach().clone()
    logged = first_log(make(model, loss_type=[loss_type], use_weighting=True))
    assert math.isfinite(logged["loss"])
    assert 0 < logged["grad_norm"] < math.inf
    assert not torch.equal(model.lm_head.weight, before)


# As long as one another, or the lengths alone would order any model's margins.
EVEN = make_pairs([(5, 0, 7, 7), (1, 0, 4, 4), (12, 4, 3, 3), (3, 2, 5, 5)])


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_sorts_the_pairs_of_the_whole_step(make: Callable[..., Any], loss_type: str) -> None:
    """Four micro-batches of one pair are one batch of four; TRL's are plain `sigmoid`."""
    policy, reference = make_model("llama"), make_model("llama", rms_norm_eps=0.3)
    with torch.no_grad():  # it orders the pairs in another way
        reference.lm_head.weight.neg_()
    (chosen, rejected), (ref_chosen, ref_rejected) = (sequence_logps(stock(m), EVEN) for m in (policy, reference))
    ours, theirs = {
        "aot": (chosen - rejected, ref_chosen - ref_rejected),
        "aot_unpaired": (chosen - ref_chosen, rejected - ref_rejected),
    }[loss_type]
    assert not torch.equal(ours.argsort(), theirs.argsort())
    expected = torch.log1p(torch.exp(-BETA * (ours.sort().values - theirs.sort().values))).mean().item()

    def loss(**args: Any) -> float:
        return first_log(make(copy.deepcopy(policy), EVEN, ref_model=copy.deepcopy(reference), **args))["loss"]

    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(EVEN)}
    assert loss(loss_type=[loss_type]) == pytest.approx(expected, abs=1e-5)
    assert loss(loss_type=[loss_type], **single) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - loss(loss_type=["sigmoid"])) > 1e-3


# A head with something around it, which TRL's fused head passes by


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "subclass"])
def test_a_head_with_something_around_it_is_right(make: Callable[..., Any], kind: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model = make_model("llama")
    plain = sequence_logps(stock(model))[0].mean().item()
    if kind == "hook":
        model.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits)
    elif kind == "pre-hook":
        model.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    else:
        head = Doubled(model.lm_head.in_features, VOCAB, bias=False)
        head.load_state_dict(model.lm_head.state_dict())
        model.set_output_embeddings(head)
    expected = sequence_logps(stock(model))[0].mean().item()
    assert abs(expected - plain) > 1
    assert first_log(make(model))["logps/chosen"] == pytest.approx(expected, abs=1e-4)
