"""fastdpo.model: a patched model against the stock one, sequence by sequence."""

import copy
import inspect
import json
from types import MethodType

import peft
import pytest
import torch
import transformers
from torch import nn

from fastdpo import attention
from fastdpo.model import TokenScores, find_head, layout_of, patch_forward
from fastdpo.packing import shared_prefix_batch
from tests.tiny import (
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

LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def pack(pairs=PAIRS, **options):
    return shared_prefix_batch(pairs, **options)


def score(model, pairs=PAIRS, **options):
    return model(**pack(pairs, **options)).logps


def scored_hidden(model, **inputs):
    """What the head is given."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    hook.remove()
    return seen[0]


def make_patched(family="llama", **overrides):
    """A patched model and a stock copy of it."""
    model = make_model(family, **overrides)
    reference = stock(model)
    patch_forward(model)
    return model, reference


def make_adapted(**options):
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**LORA, **options))
    with torch.no_grad():  # LoRA's B starts at 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# Exactness


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-window", "gemma3-window", "qwen2-moe-window"])
def test_equals_separate_sequences(family, tied, layout):
    model, reference = make_patched(family, tie_word_embeddings=tied)
    assert max(len(prompt) + len(response) for prompt, response in sequences(PAIRS)) > 2 * WINDOW
    batch = pack(layout=layout)

    hidden = scored_hidden(model, **batch)
    expected = [
        scored_hidden(reference, input_ids=torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        for prompt, response in sequences(PAIRS)
    ]
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=0, atol=1e-5)

    logps, expected = model(**batch).logps, stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))


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
    hidden = scored_hidden(model, **batch)
    expected = [
        scored_hidden(reference, input_ids=torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        for prompt, response in sequences(PAIRS)
    ]
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=0, atol=1e-5)
    logps, expected = model(**batch).logps, stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))


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
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(attention._PACKING.get()))
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


def test_other_adapters_of_the_head_leave_it_to_the_model():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True)
    model = peft.get_peft_model(make_model("llama"), config)
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.normal_()
    reference = copy.deepcopy(model)
    patch_forward(model)
    assert "not plain LoRA" in find_head(model).own
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
    assert again.config._attn_implementation != attention.NAME
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


# Finding the head


def test_find_head_of_a_plain_model():
    model = make_model("cohere", logit_scale=0.25)
    head = find_head(model)
    assert head == (model.model, model.lm_head, (model.lm_head,), 0.25, None, None, None)


def test_find_head_looks_into_peft():
    model = make_adapted(modules_to_save=["lm_head"])
    base = model.get_base_model()
    head = find_head(model)
    assert head.decoder is base.model
    assert head.linears == (base.lm_head.original_module, base.lm_head.modules_to_save["default"])


def make_llama4(layer_type):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    layers = {"num_hidden_layers": 1, "layer_types": [layer_type], "moe_layers": []}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, **heads, **layers, **tokens))


def test_find_head_where_get_decoder_returns_the_model(monkeypatch):
    monkeypatch.setattr("fastdpo.heads.can_probe", lambda model: False)  # which would try the next module
    model = make_llama4("full_attention")
    assert model.get_decoder() is model
    assert find_head(model).decoder is model.model


def rope(rope_type):
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4} if rope_type == "longrope" else {}
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, **factors}
    return {"rope_parameters": parameters | {"original_max_position_embeddings": 64}}


def with_head(head):
    model = make_model("llama")
    model.set_output_embeddings(head)
    return model


class ScaledLinear(nn.Linear):
    """As quantized Linears are: a subclass with another forward."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def with_more_parameters():
    model = make_model("llama")
    model.extra = nn.Linear(2, 2)
    return model


def make_bloom():
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
    )


def make_recurrent():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16}
    config = transformers.RecurrentGemmaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    return transformers.RecurrentGemmaForCausalLM(config)


def test_refuses_what_no_layout_is_exact_on():
    with pytest.raises(ValueError, match=r"Linear cannot run these batches: it is not a model of transformers"):
        patch_forward(nn.Linear(2, 2))
    model = peft.get_peft_model(
        make_model("llama"), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="cannot run these batches: it puts trained prompts before the tokens"):
        patch_forward(model)
    assert "forward" not in vars(model.get_base_model())  # nothing has been changed


PADDED = [
    pytest.param(lambda: make_llama4("chunked_attention"), "layers of type chunked_attention", id="chunked"),
    pytest.param(lambda: make_model("llama", **rope("dynamic")), "dynamic RoPE depends on the", id="dynamic-rope"),
    pytest.param(lambda: make_model("llama", **rope("longrope")), "longrope RoPE depends on the", id="longrope"),
    pytest.param(make_bloom, "its attention does not go through", id="own-attention"),
    pytest.param(make_recurrent, "its layers carry a state", id="recurrent"),
    pytest.param(lambda: make_model("llama", attention_dropout=0.1), "mask of its attention", id="dropout"),
]


@pytest.mark.parametrize(("make", "reason"), PADDED)
def test_pads_what_cannot_be_packed(make, reason):
    model = make()
    layout, why = layout_of(model)
    assert layout == "padded"
    assert reason in why
    reference = copy.deepcopy(model.eval())
    patch_forward(model)
    logps, expected = score(model, layout="padded"), stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))
    if "dropout" not in why:
        with pytest.raises(ValueError, match=reason):
            score(model)


OWN_HEADS = [
    pytest.param(lambda: with_head(ScaledLinear(32, VOCAB)), "are ScaledLinear, not a plain nn.Linear", id="own-head"),
    pytest.param(with_more_parameters, "extra.weight is neither in its decoder nor in its", id="more-parameters"),
]


@pytest.mark.parametrize(("make", "reason"), OWN_HEADS)
def test_a_head_that_cannot_be_fused_is_the_models_own(make, reason, monkeypatch, caplog):
    monkeypatch.setattr("fastdpo.heads.CHUNK_BYTES", 4 * VOCAB * 7)  # chunks of 7 rows
    model = make()
    reference = stock(model)
    patch_forward(model)
    assert reason in caplog.text
    logps, expected = score(model), stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))


def test_the_models_own_head_runs_the_body_once_and_keeps_no_logits(monkeypatch):
    monkeypatch.setattr("fastdpo.heads.CHUNK_BYTES", 4 * VOCAB * 7)
    model = with_head(ScaledLinear(32, VOCAB))
    patch_forward(model)
    layers, rows, kept = [], [], []
    model.model.layers[0].register_forward_hook(lambda *_: layers.append(1))
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[-2]))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        logps = score(model)
    assert len(layers) == 1
    assert max(rows) == 7
    assert sum(rows) == len(logps)
    assert not [shape for shape in kept if VOCAB in shape and 7 in shape]
    logps.sum().backward()
    assert len(layers) == 1  # again in the backward: chunks of the head alone


def test_a_compiled_body_is_not_compiled_again_to_answer_with_hidden_states():
    model = with_head(ScaledLinear(32, VOCAB))
    reference = stock(model)
    graphs = []
    model.model.compile(backend=lambda graph, _: graphs.append(1) or graph.forward)
    patch_forward(model)
    assert not graphs
    logps = score(model, layout="padded")
    torch.testing.assert_close(logps, stock_logps(reference, PAIRS), rtol=0, atol=1e-5)
    before = len(graphs)
    assert before
    score(model, layout="padded")
    assert len(graphs) == before


def test_statistics_of_the_models_own_head():
    model = make_model("llama")
    twin = copy.deepcopy(model)
    twin.lm_head = ScaledLinear(32, VOCAB, bias=False)
    twin.lm_head.weight = nn.Parameter(model.lm_head.weight / 2)
    patch_forward(model)
    patch_forward(twin)
    expected, actual = (m(**pack(), with_stats=True) for m in (model, twin))
    torch.testing.assert_close(actual.logps, expected.logps)
    for name in ("entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(getattr(actual.stats, name), getattr(expected.stats, name), rtol=1e-4, atol=1e-5)
        assert not getattr(actual.stats, name).requires_grad
    assert torch.equal(actual.stats.is_top1, expected.stats.is_top1)


def test_hidden_states_take_the_dtype_of_the_head():
    """Mamba's residual may be float32 before a head in 16 bits."""
    model = make_model("llama")
    model.lm_head.double()
    logps = score_after(model)
    expected = stock_logps(make_model("llama"), PAIRS).double()
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


def score_after(model):
    patch_forward(model)
    return score(model)


def test_longrope_beyond_its_limit_is_exact_row_by_row():
    """The longest row of a call chooses the frequencies of all."""
    options = rope("longrope")
    options["rope_parameters"] |= {"long_factor": [3.0] * 4}
    model = make_model("llama", **options)
    pairs = make_pairs([(40, 0, 40, 3), (5, 0, 4, 6)])
    expected = stock_logps(copy.deepcopy(model), pairs)
    wrong = model(**{k: pack(pairs, layout="padded")[k] for k in ("input_ids", "attention_mask")}).logits
    logps = score_after_pairs(model, pairs)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    batch = pack(pairs, layout="padded")
    joint = wrong.flatten(0, 1)[batch["logit_index"]].log_softmax(-1).gather(1, batch["target_ids"][:, None])[:, 0]
    assert (joint - expected).abs().max() > 0.1


def score_after_pairs(model, pairs):
    patch_forward(model)
    return score(model, pairs, layout="padded")


def test_dynamic_rope_beyond_its_limit_is_refused():
    model = make_model("llama", **rope("dynamic"), max_position_embeddings=32)
    patch_forward(model)
    pairs = make_pairs([(30, 0, 10, 3)])
    with pytest.raises(ValueError, match="beyond 32 tokens its dynamic RoPE depends on the batches before; set max_l"):
        score(model, pairs, layout="padded")


def test_dropout_of_hidden_states_packs_without_sharing():
    model = make_model("gpt2", resid_pdrop=0.1)
    assert layout_of(model) == ("packed", "what is shared could have only one dropout mask")


def test_an_encoder_and_decoder_is_refused():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot run these batches: it is an encoder and"):
        layout_of(transformers.T5ForConditionalGeneration(config))


def test_hybrids_say_how_they_could_share_prompts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    layout, reason = layout_of(make_model("mamba2"))
    assert layout == "padded"
    assert "pip install tree-recurrence" in reason


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_a_batch_whose_trunks_are_no_segments_is_refused_by_a_hybrid(family):
    """Its recurrent layers would go on from the end of the first response, silently."""
    pytest.importorskip("tree_recurrence")
    model = make_model(family)
    patch_forward(model)
    for pairs in (PAIRS, PAIRS[:1], PAIRS[2:3]):
        for multiple in (1, 64):
            with pytest.raises(ValueError, match="its layers carry a state, so shared prompts need layout='tree'"):
                score(model, pairs, layout="shared", pad_to_multiple_of=multiple)
            for layout in ("tree", "packed"):
                logps = score(model, pairs, layout=layout, pad_to_multiple_of=multiple)
                torch.testing.assert_close(logps, score(model, pairs, layout="padded"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3-next", "mamba2", "bamba", "lfm2"])
def test_hybrids_are_exact_padded(family, monkeypatch):
    monkeypatch.setattr("fastdpo.hybrid.follows_trees", lambda model: "no")
    model = make_model(family)
    expected = stock_logps(model, PAIRS)
    torch.testing.assert_close(score_after_pairs(model, PAIRS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("asks", [False, True])
def test_a_router_with_a_balancing_loss_shares(asks):
    assert layout_of(make_model("mixtral", output_router_logits=asks, router_aux_loss_coef=0.1))[0] == "shared"
