"""fastdpo.model.scoring_forward: a patched model against the stock one, sequence by sequence."""

import copy
import inspect
import json
from types import MethodType

import peft
import pytest
import torch
import transformers

from fastdpo.model.attention import registered
from fastdpo.model.body_and_head import _Hidden, fused_scores
from fastdpo.model.layout import layout_of
from fastdpo.model.scoring_forward import TokenScores, find_head, patch_forward
from tests.helpers.packed import (
    LORA,
    assert_equals_separate_sequences,
    make_adapted,
    make_patched,
    pack,
    score,
    scored_hidden,
)
from tests.helpers.tiny import (
    PAIRS,
    VOCAB,
    WINDOW,
    assert_same_gradients,
    gradients,
    make_model,
    make_pairs,
    sequences,
    stock,
    stock_logps,
)

# Exactness


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-window", "gemma3-window", "qwen2-moe-window"])
def test_equals_separate_sequences(family, tied, layout):
    model, reference = make_patched(family, tie_word_embeddings=tied)
    assert max(len(prompt) + len(response) for prompt, response in sequences(PAIRS)) > 2 * WINDOW
    batch = pack(layout=layout)

    assert_equals_separate_sequences(model, reference, batch)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("gemma3-window", {"final_logit_softcapping": 2.0}, id="softcap"),
        pytest.param("cohere", {"logit_scale": 0.25}, id="scaled-cohere"),
        pytest.param("granite", {"logits_scaling": 3.0}, id="divided-granite"),
        pytest.param("hyperclovax", {"logits_scaling": 0.5}, id="multiplied-hyperclovax"),
        pytest.param("phi", {}, id="bias-phi"),
        pytest.param("mixtral", {}, id="experts-mixtral"),
    ],
)
def test_equals_the_models_own_head(family, options):
    model, reference = make_patched(family, **options)
    logps, expected = score(model), stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))


FAMILIES = ["qwen2-window", "qwen3-moe", "gemma", "phi3", "olmo2", "cohere2-window", "gpt2", "gpt-neox", "opt"]
FAMILIES += ["starcoder2", "smollm3", "deepseek-v3"]


@pytest.mark.parametrize(
    ("family", "layout"),
    [*((family, "shared") for family in FAMILIES), ("llama4", "padded")]
    + [(family, "tree") for family in ("qwen3-next", "mamba2", "bamba", "lfm2")],
)
def test_equals_separate_sequences_in_the_layout_of_its_family(family, layout):
    if layout == "tree":
        pytest.importorskip("tree_recurrence")
    model = make_model(family)
    assert layout_of(model)[0] == layout
    reference = copy.deepcopy(model)
    patch_forward(model)
    batch = pack(layout=layout)
    assert_equals_separate_sequences(model, reference, batch)


def test_equals_separate_sequences_beyond_one_tile_of_attention():
    pairs = make_pairs([(150, 0, 90, 170), (3, 20, 64, 1)])
    model, reference = make_patched("mistral-window", sliding_window=40, max_position_embeddings=512)
    logps, expected = score(model, pairs), stock_logps(reference, pairs)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))


def test_neither_order_nor_filling_matters():
    model, _ = make_patched()
    sizes = [len(response) for _, response in sequences(PAIRS)]
    logps = score(model)
    order = [2, 0, 3, 1]
    shuffled = score(model, [PAIRS[i] for i in order], pad_to_multiple_of=1)
    parts = logps.split(sizes)
    expected = torch.cat([parts[i] for i in order] + [parts[len(PAIRS) + i] for i in order])
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model, _ = make_patched("gemma3-window")
    expected = gradients(model, score(model))
    calls = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(registered._PACKING.get()))
    # its name from transformers 5.23 on
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    assert_same_gradients(gradients(model, score(model)), expected, bound=1e-6)
    assert calls == [True, False]  # once in the forward, once again in the backward, outside of packing()
    hook.remove()


def test_statistics_on_request():
    model, reference = make_patched()
    scores = model(**pack(), with_stats=True)
    assert isinstance(scores, TokenScores)
    assert model(**pack()).stats is None
    logits = torch.cat(
        [
            reference(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            for prompt, response in sequences(PAIRS)
        ]
    )
    torch.testing.assert_close(scores.stats.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(scores.stats.is_top1, logits.argmax(-1) == pack()["target_ids"])
    torch.testing.assert_close(scores.logps, model(**pack()).logps)


def test_scores_under_autocast():
    model, reference = make_patched()
    with torch.autocast("cpu", torch.bfloat16):
        logps = score(model)
        expected = stock_logps(reference, PAIRS)
    assert (logps - expected).abs().max() < 0.2  # some logits of 8, in steps of 1/32


# PEFT


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["lora", "lora-and-whole-head"])
def test_equals_separate_sequences_with_adapters(modules_to_save):
    model = make_adapted(modules_to_save=modules_to_save)
    reference = copy.deepcopy(model)
    patch_forward(model)
    logps, expected = score(model), stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    actual = gradients(model, logps)
    assert any("lm_head" in name for name in actual) == bool(modules_to_save)
    assert_same_gradients(actual, gradients(reference, expected))

    with model.disable_adapter(), reference.disable_adapter():
        without = score(model)
        torch.testing.assert_close(without, stock_logps(reference, PAIRS), rtol=0, atol=1e-5)
    assert (without - logps).abs().max() > 0.1


def test_adapters_may_come_after_the_patch():
    base, _ = make_patched()
    before = score(base)
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight[:3] *= 2
    logps = score(model)
    torch.testing.assert_close(logps, stock_logps(model, PAIRS), rtol=0, atol=1e-5)
    assert (logps - before).abs().max() > 0.1


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_the_head(when):
    """Its product is never formed; switched off, it is the base model."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_alpha=12)
    base = make_model("llama")
    if when == "after":
        patch_forward(base)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.normal_()
    reference = copy.deepcopy(model)
    if when == "before":
        patch_forward(model)
    logps, expected = score(model), stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    actual = gradients(model, logps)
    assert {name.split(".")[-3] for name in actual if "lm_head" in name} == {"lora_A", "lora_B"}
    assert_same_gradients(actual, gradients(reference, expected))
    with model.disable_adapter(), reference.disable_adapter():
        torch.testing.assert_close(score(model), stock_logps(reference, PAIRS), rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(score(model), logps.detach(), rtol=0, atol=1e-4)


def make_with_trained_tokens(dtype=torch.float32):
    """A model whose head is tied to embeddings of which three rows are trained."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4, 90]})
    model = peft.get_peft_model(make_model("llama", tie_word_embeddings=True), config).to(dtype)
    (rows,) = (p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    with torch.no_grad():
        rows.add_(torch.randn(rows.shape))
    return model


def test_trained_tokens_of_a_tied_head():
    model = make_with_trained_tokens()
    reference = copy.deepcopy(model)
    patch_forward(model)
    assert find_head(model).own is None
    logps, expected = score(model), stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))
    with model.disable_adapter(), reference.disable_adapter():
        without = score(model)
        torch.testing.assert_close(without, stock_logps(reference, PAIRS), rtol=0, atol=1e-5)
    assert (without - logps).abs().max() > 0.5
    model.merge_adapter()
    torch.testing.assert_close(score(model), logps.detach(), rtol=0, atol=1e-4)


def test_logits_of_trained_tokens_are_not_rounded_to_16_bits():
    model = make_with_trained_tokens(torch.bfloat16)
    hidden, targets = torch.randn(64, 32).bfloat16(), torch.tensor([3, 4, 90, 5]).repeat(16)
    logps = fused_scores(find_head(model), hidden, targets, False)
    weight = model.get_output_embeddings().weight.double()
    exact = (hidden.double() @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert (logps - exact).abs().max() < 1e-3  # where bfloat16 logits are off by 1/32


def test_other_adapters_of_the_head_leave_it_to_the_model():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True)
    model = peft.get_peft_model(make_model("llama"), config)
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.normal_()
    reference = copy.deepcopy(model)
    patch_forward(model)
    assert "neither plain LoRA nor trained tokens" in find_head(model).own
    logps, expected = score(model), stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))


# Everything else is as before


def test_generate_and_plain_forward_are_as_before():
    model = make_model("gemma3-window").eval()
    reference = stock(model, "sdpa")
    patch_forward(model)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    score(model)
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    assert torch.equal(
        model(**inputs, labels=ids, use_cache=False).loss, reference(**inputs, labels=ids, use_cache=False).loss
    )
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), reference.generate(**inputs, **options))


def test_save_pretrained_leaves_no_trace(tmp_path):
    model, reference = make_patched()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "fastdpo" not in json.dumps(config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation != registered.NAME
    torch.testing.assert_close(stock_logps(again, PAIRS), stock_logps(reference, PAIRS))


def test_a_deepcopy_is_patched_and_independent():
    model, reference = make_patched()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = stock_logps(reference, PAIRS)
    torch.testing.assert_close(score(twin), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(stock_logps(twin, PAIRS), expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(twin, score(twin)), gradients(reference, expected))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_of_the_instance_is_kept_even_by_a_deepcopy():
    def forward(self, **inputs):
        return self, type(self).forward(self, **inputs)

    model = make_model("llama")
    model.forward = MethodType(forward, model)
    patch_forward(model)
    patch_forward(model)  # twice is once
    for patched in (model, copy.deepcopy(model)):
        who, output = patched(input_ids=torch.tensor([[3, 4, 5]]))
        assert who is patched
        assert output.logits.shape == (1, 3, VOCAB)
        assert score(patched).shape == pack()["target_ids"].shape


def test_the_head_is_a_call_of_its_module():
    model, _ = make_patched()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape)))
    score(model)
    M = len(pack()["target_ids"])
    assert seen == [(M, model.config.hidden_size), (M,)]


def test_an_error_in_the_head_leaves_the_model_as_it_was():
    model, reference = make_patched()
    batch = pack()
    batch["target_ids"][0] = VOCAB
    with pytest.raises(ValueError, match="targets"):
        model(**batch)
    torch.testing.assert_close(stock_logps(model, PAIRS), stock_logps(reference, PAIRS))


def test_the_signature_is_the_models_own():
    model, reference = make_patched()
    assert inspect.signature(model.forward) == inspect.signature(reference.forward)  # generate() reads it
    assert not hasattr(model.forward, "__wrapped__")  # accelerate would unwrap it


# Silent traps


def test_stock_attention_is_wrong_on_a_packed_batch():
    """If it were right, the tests above would prove nothing."""
    model, reference = make_patched()
    batch = pack()
    wrong = scored_hidden(reference, input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    hidden = scored_hidden(model, **batch)
    assert (wrong[0, batch["logit_index"]] - hidden).abs().max() > 0.1


def test_a_model_that_drops_the_metadata_raises():
    model, _ = make_patched()
    layer = model.model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda hidden_states, position_embeddings, attention_mask=None, **_: own(
        hidden_states, position_embeddings, attention_mask
    )
    with pytest.raises(ValueError, match="LlamaAttention got no packing metadata"):
        score(model)


def test_another_attention_set_after_patching_raises():
    model, _ = make_patched()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="its attention is 'sdpa' and not 'fastdpo'"):
        score(model)


def test_attention_dropout_raises_in_training_alone():
    model, _ = make_patched(attention_dropout=0.1)
    with pytest.raises(ValueError, match="attention dropout must be 0"):
        score(model)
    score(model.eval())


def test_no_cache_is_made():
    model, _ = make_patched()
    calls = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    model.model.register_forward_hook(lambda _, args, output: calls.append(output))
    score(model)
    assert calls[0]["use_cache"] is False
    assert calls[1].past_key_values is None


def test_transformers_does_not_wait_for_the_device_to_find_sequences(monkeypatch):
    model, _ = make_patched("gemma3-window")
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", None)
    score(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tree_kv_index": None}, "a packed batch needs tree_kv_index"),
        ({"target_ids": None, "position_ids": None}, "a packed batch needs target_ids, position_ids"),
        ({"attention_mask": torch.ones(1, 64)}, "a padded batch takes no tree_"),
        ({"use_cache": True}, "a packed batch takes no use_cache"),
        ({"input_ids": torch.ones(2, 64, dtype=torch.int64)}, r"must be \[1, T\], got \(2, 64\)"),
    ],
    ids=["no-metadata", "no-targets", "mask", "cache", "two-rows"],
)
def test_refuses_a_batch_that_is_not_packed(change, message):
    model, _ = make_patched()
    with pytest.raises(ValueError, match=message):
        model(**pack() | change)


def test_outputs_of_an_own_head_are_taken_for_no_namedtuple() -> None:
    """DeepSpeed's hooks would rebuild one from its fields."""
    outputs = _Hidden((torch.ones(1, 2, 3),))
    assert not hasattr(outputs, "_fields")
    assert not hasattr(outputs, "_asdict")
    assert outputs.past_key_values is None
    assert outputs.last_hidden_state is outputs[0]


def test_an_own_head_is_refused_where_zero3_shards_it() -> None:
    """Its logits are computed again in the backward, when ZeRO-3 has let the weights go."""
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True)
    model = peft.get_peft_model(make_model("llama"), config)
    patch_forward(model)
    batch = pack()
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logps).all()
    next(model.parameters()).ds_id = 0  # as ZeRO-3 marks what it shards
    with pytest.raises(ValueError, match=r"its own head computes the logits .*; with ZeRO-3, use FSDP2 or ZeRO-2"):
        model(**batch)
