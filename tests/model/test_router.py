"""The balancing loss against the stock model's, of every sequence in a row of its own."""

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fastdpo
from fastdpo.checks import check_first_loss
from fastdpo.model.router import coefficient, why_it_differs
from fastdpo.model.scoring_forward import patch_forward
from tests.helpers.tiny import PAIRS, assert_same_gradients, make_model, make_pairs, sequences, stock
from tests.helpers.trainers import NoTokenizer

FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "phimoe"]
LAYOUTS = ["shared", "packed", "tree", "padded"]
COEF = 0.5


def moe(family: str, **overrides: Any) -> Any:
    experts = {"num_local_experts": 4} if family == "mixtral" else {}
    return make_model(family, **experts | overrides).eval()  # PhiMoE draws its experts in training


def stock_aux_loss(model: Any, pairs: list[Any], *, last: bool = False) -> Tensor:
    """As transformers and TRL have it: padded rows of full sequences, without their last token unless `last`."""
    rows = [torch.tensor((prompt + response)[: None if last else -1]) for prompt, response in sequences(pairs)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    loss: Tensor = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    return loss


def aux_loss(model: Any, pairs: list[Any], layout: str) -> Tensor:
    loss: Tensor = model(**fastdpo.shared_prefix_batch(pairs, layout=layout), with_aux_loss=True).aux_loss
    return loss


def loss_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_stock_models_in_every_layout(family: str) -> None:
    model = moe(family)
    expected = stock_aux_loss(reference := stock(model), PAIRS)
    gradients = loss_gradients(reference, expected)
    patch_forward(model)
    for layout in LAYOUTS:
        actual = aux_loss(model, PAIRS, layout)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
        assert_same_gradients(loss_gradients(model, actual), gradients)


def test_recurrent_layers_follow_a_tree() -> None:
    model = moe("qwen3-next", num_experts=4)
    expected = stock_aux_loss(stock(model), PAIRS)
    patch_forward(model)
    torch.testing.assert_close(aux_loss(model, PAIRS, "tree"), expected, rtol=1e-5, atol=0)


def test_counts_responses_of_every_kind() -> None:
    """Three responses that share a start, two, and one, which shares nothing."""
    model = moe("mixtral")
    reference = stock(model)
    patch_forward(model)
    prompt = [5, 6, 7]
    ranked = [[8, 9, 2], [8, 9, 10, 11, 2], [8, 2]]
    examples = [{"prompt_ids": prompt, "ranked_ids": ranked}, {"prompt_ids": [9, 9], "ranked_ids": ranked[:2]}]
    chosen = [{"prompt_ids": [12, *prompt], "completion_ids": ranked[1], "label": True}]
    for batch in (examples, chosen):
        full = [(e["prompt_ids"], r) for e in batch for r in e.get("ranked_ids", [e.get("completion_ids")])]
        rows = [torch.tensor((p + r)[:-1]) for p, r in full]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        mask = (ids >= 0).long()
        expected = reference(input_ids=ids.clamp(min=0), attention_mask=mask, output_router_logits=True).aux_loss
        for layout in LAYOUTS:
            torch.testing.assert_close(aux_loss(model, batch, layout), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_response_of_several_pairs_counts_for_each(layout: str) -> None:
    model = moe("qwen3-moe")
    other = PAIRS[2] | {"chosen_ids": PAIRS[2]["rejected_ids"], "rejected_ids": [5, 6, 2]}
    pairs = [*PAIRS, PAIRS[0], other]
    expected = stock_aux_loss(stock(model), pairs)
    patch_forward(model)
    batch = fastdpo.shared_prefix_batch(pairs, layout=layout, across_examples=True)
    loss = model(**batch, with_aux_loss=True).aux_loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_differs_from_trls_by_the_last_tokens_alone() -> None:
    model = moe("qwen3-moe")
    pairs = make_pairs([(40, 0, 30, 20), (30, 0, 40, 25)])
    theirs = stock_aux_loss(stock(model), pairs, last=True)
    patch_forward(model)
    ours = aux_loss(model, pairs, "shared")
    assert 0 < (ours - theirs).abs() < 0.02 * theirs


def test_with_the_models_own_head_and_statistics() -> None:
    model = moe("mixtral")
    expected = stock_aux_loss(stock(model), PAIRS)
    patch_forward(model)
    vars(model)["_fastdpo"] = vars(model)["_fastdpo"]._replace(own="for the test")
    scores = model(**fastdpo.shared_prefix_batch(PAIRS), with_stats=True, with_aux_loss=True)
    torch.testing.assert_close(scores.aux_loss, expected, rtol=1e-5, atol=0)
    assert scores.stats is not None
    assert model(**fastdpo.shared_prefix_batch(PAIRS)).aux_loss is None


def test_rows_run_one_by_one_beyond_a_longrope_limit() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    rope |= {"original_max_position_embeddings": 8, "factor": 1.0, "short_mscale": 1.0, "long_mscale": 1.0}
    model = moe("phimoe", rope_parameters=rope)
    expected = stock_aux_loss(stock(model), PAIRS)  # the frequencies are the same, beyond the limit and before
    patch_forward(model)
    torch.testing.assert_close(aux_loss(model, PAIRS, "padded"), expected, rtol=1e-5, atol=0)


def test_refuses_what_has_no_balancing_loss(caplog: pytest.LogCaptureFixture) -> None:
    llama = make_model("llama")
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.1, but LlamaForCausalLM computes no balancing"):
        coefficient(llama, 0.1)
    assert coefficient(llama, 0.0) == coefficient(llama, None) == 0.0
    llama4 = make_model("llama4")
    with caplog.at_level(logging.WARNING, "fastdpo"):
        assert coefficient(llama4, 0.0) == 0.0
        assert not caplog.messages
        assert coefficient(llama4, None) == 0.0
    assert "Llama4ForCausalLM computes no balancing loss" in caplog.text
    patch_forward(llama)
    with pytest.raises(ValueError, match="returns no balancing loss"):
        aux_loss(llama, PAIRS, "shared")


def test_the_models_own_coefficient_is_the_default() -> None:
    model = moe("mixtral", router_aux_loss_coef=0.25)
    assert [coefficient(model, given) for given in (None, 0.0, 0.5)] == [0.25, 0.0, 0.5]


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_refuses_a_coefficient_that_is_none(value: float) -> None:
    with pytest.raises(ValueError, match="router_aux_loss_coef must be finite and at least 0"):
        fastdpo.DPOConfig(output_dir="unused", router_aux_loss_coef=value)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_router_has_a_gradient_or_is_refused(reentrant: bool) -> None:
    """Reentrant checkpoints run it without a graph."""
    model = moe("mixtral").train()
    reference = stock(model)
    patch_forward(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(ValueError, match="no gradient reaches the router's balancing loss"):
            aux_loss(model, PAIRS, "shared")
    else:
        actual = loss_gradients(model, aux_loss(model, PAIRS, "shared"))
        assert_same_gradients(actual, loss_gradients(reference, stock_aux_loss(reference, PAIRS)))


# Training

DATA = make_pairs([(5, 0, 7, 3), (2, 0, 2, 9), (12, 4, 1, 6), (3, 2, 4, 2), (6, 0, 3, 3), (9, 1, 2, 4)], seed=3)


def train(out: Path, model: Any = None, **settings: Any) -> Any:
    import datasets

    data = datasets.Dataset.from_list(DATA)
    settings = {
        "router_aux_loss_coef": COEF,
        "per_device_train_batch_size": 6,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam would hide a wrong scale of the gradients
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
    } | settings
    common = {"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    common |= {"output_dir": str(out), "disable_tqdm": True, "use_cpu": True, "train_sampling_strategy": "sequential"}
    model = moe("mixtral") if model is None else model
    trainer = fastdpo.DPOTrainer(
        model=model,
        args=fastdpo.DPOConfig(**(common | {k: v for k, v in settings.items() if k != "peft_config"})),
        train_dataset=data,
        eval_dataset=data,
        processing_class=NoTokenizer(),
        peft_config=settings.get("peft_config"),
    )
    trainer.train()
    return trainer


def test_training_adds_it_to_the_loss(tmp_path: Path) -> None:
    model, start = moe("mixtral"), moe("mixtral")
    log = train(tmp_path, model).state.log_history[0]
    expected = stock_aux_loss(start, DATA)
    value = float(expected.detach())
    assert log["aux_loss"] == pytest.approx(value, rel=1e-5)
    assert log["loss"] == pytest.approx(0.693147 + COEF * value, rel=1e-5)
    without = moe("mixtral")
    assert "aux_loss" not in train(tmp_path, without, router_aux_loss_coef=0.0).state.log_history[0]
    gradients = loss_gradients(start, expected)
    for name, p in model.named_parameters():  # all that differs is the gradient of the balancing loss
        moved = without.get_parameter(name) - p
        torch.testing.assert_close(moved, 0.1 * COEF * gradients.get(name, torch.zeros_like(p)), rtol=1e-3, atol=3e-6)


def test_micro_batches_weigh_by_their_examples(tmp_path: Path) -> None:
    """Four pairs and two, checkpointed: the same step as the mean of both losses over the pairs."""
    model, start = moe("mixtral"), moe("mixtral")
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    trainer = train(tmp_path, model, **settings)
    expected = (4 * stock_aux_loss(start, DATA[:4]) + 2 * stock_aux_loss(start, DATA[4:])) / 6
    value, log = float(expected.detach()), trainer.state.log_history[0]
    assert log["aux_loss"] == pytest.approx(value, rel=1e-5)
    assert log["loss"] == pytest.approx(0.693147 + COEF * value, rel=1e-5)
    without = moe("mixtral")
    train(tmp_path, without, router_aux_loss_coef=0.0, **settings)
    gradients = loss_gradients(start, expected)
    for name, p in model.named_parameters():
        moved = without.get_parameter(name) - p
        torch.testing.assert_close(moved, 0.1 * COEF * gradients.get(name, torch.zeros_like(p)), rtol=1e-3, atol=3e-6)


def test_every_record_has_it(tmp_path: Path) -> None:
    """Also a run's last one, by the coefficient of the model's own config."""
    settings = {"max_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    model = moe("qwen3-moe", router_aux_loss_coef=0.01)
    history = train(tmp_path, model, router_aux_loss_coef=None, **settings).state.log_history
    assert [entry["step"] for entry in history if "aux_loss" in entry] == [2, 3]
    assert [entry["step"] for entry in history if "eval_aux_loss" in entry] == [2, 3]
    assert len(history) == 4


def test_evaluation_adds_it_too(tmp_path: Path) -> None:
    model = moe("mixtral")
    trainer = train(tmp_path, model, learning_rate=0.0, per_device_eval_batch_size=4)
    result = trainer.evaluate()
    with torch.no_grad():
        parts = [float(stock_aux_loss(moe("mixtral"), part)) for part in (DATA[:4], DATA[4:])]
    expected = (4 * parts[0] + 2 * parts[1]) / 6
    assert result["eval_aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["eval_loss"] == pytest.approx(0.693147 + COEF * expected, rel=1e-5)


def test_trains_an_adapter_by_it(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    model = moe("mixtral", router_aux_loss_coef=COEF)
    trainer = train(tmp_path, model, peft_config=config, router_aux_loss_coef=None)
    expected = float(stock_aux_loss(moe("mixtral"), DATA).detach())
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "cause"),
    [
        ("phimoe", "the router draws experts or noise at random in training.*router_jitter_noise=0.01"),
        ("qwen3-moe", "the router sends a token that is nearly tied between experts elsewhere"),
        ("llama", "The reference is not what it seems: dropout"),
    ],
)
def test_a_first_loss_that_is_not_ln_2_names_the_router(family: str, cause: str) -> None:
    router = why_it_differs(make_model(family).config)
    with pytest.raises(ValueError, match=cause):
        check_first_loss(torch.full((3,), 0.71), torch.tensor([-9.0]), torch.float32, router=router)


def test_refuses_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM computes no balancing loss"):
        train(tmp_path, make_model("llama"))
