"""What fastdpo.model finds in models of all kinds, and so how each of them is scored."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from benchmarks.studies import tiny_vision
from fastdpo.model.layout import check_sharded, layout_of
from fastdpo.model.scoring_forward import find_head, may_leave_unused, patch_forward
from tests.helpers.packed import make_adapted, pack, score
from tests.helpers.tiny import (
    PAIRS,
    VOCAB,
    assert_same_gradients,
    gradients,
    make_model,
    make_pairs,
    stock,
    stock_logps,
)

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
    monkeypatch.setattr("fastdpo.model.body_and_head.can_probe", lambda model: False)  # which would try the next module
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
    pytest.param(lambda: make_model("llama", attention_dropout=0.1), "it drops out attention weights", id="dropout"),
    pytest.param(lambda: make_model("gpt2", attn_pdrop=0.1), "it drops out attention weights", id="dropout-module"),
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
    monkeypatch.setattr("fastdpo.model.body_and_head.CHUNK_BYTES", 4 * VOCAB * 7)  # chunks of 7 rows
    model = make()
    reference = stock(model)
    patch_forward(model)
    assert reason in caplog.text
    logps, expected = score(model), stock_logps(reference, PAIRS)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, logps), gradients(reference, expected))


def test_the_models_own_head_runs_the_body_once_and_keeps_no_logits(monkeypatch):
    monkeypatch.setattr("fastdpo.model.body_and_head.CHUNK_BYTES", 4 * VOCAB * 7)
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


def test_longrope_beyond_its_limit_is_refused_where_weights_are_sharded():
    model = make_model("llama", **rope("longrope"))
    check_sharded(model, 64)
    check_sharded(make_model("llama", **rope("dynamic")), None)
    for length in (65, None):
        with pytest.raises(ValueError, match=rf"set max_length <= 64 \(it is {length}\), or use DDP"):
            check_sharded(model, length)


def test_dynamic_rope_beyond_its_limit_is_refused():
    model = make_model("llama", **rope("dynamic"), max_position_embeddings=32)
    patch_forward(model)
    pairs = make_pairs([(30, 0, 10, 3)])
    with pytest.raises(ValueError, match="beyond 32 tokens its dynamic RoPE depends on earlier batches; set max_l"):
        score(model, pairs, layout="padded")


def test_dropout_of_hidden_states_packs_without_sharing():
    model = make_model("gpt2", resid_pdrop=0.1)
    assert layout_of(model) == (
        "packed",
        "it uses dropout (disable_dropout=False), and a token computed once can have only one mask",
    )


def test_dropout_beside_the_attention_weights_packs():
    assert layout_of(make_model("gpt2", resid_pdrop=0.1))[0] == "packed"
    model = make_adapted(lora_dropout=0.1)
    assert layout_of(model)[0] == "packed"


def test_an_encoder_and_decoder_is_refused():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot run these batches: it is an encoder and"):
        layout_of(transformers.T5ForConditionalGeneration(config))


def test_hybrids_say_how_they_could_share_prompts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    layout, reason = layout_of(make_model("mamba2"))
    assert layout == "padded"
    assert "pip install 'fastdpo[hybrid]'" in reason


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
    monkeypatch.setattr("fastdpo.model.layout._follows_trees", lambda model: "no")
    model = make_model(family)
    expected = stock_logps(model, PAIRS)
    torch.testing.assert_close(score_after_pairs(model, PAIRS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("asks", [False, True])
def test_a_router_with_a_balancing_loss_shares(asks):
    assert layout_of(make_model("mixtral", output_router_logits=asks, router_aux_loss_coef=0.1))[0] == "shared"


def test_ddp_looks_for_unused_weights_where_there_may_be_some():
    """Of experts, of a tower for images, which text does not reach, and of a decoder's attention to an encoder."""
    assert [may_leave_unused(make_model(family)) for family in ("llama", "opt", "mixtral")] == [False, False, True]
    assert may_leave_unused(tiny_vision.SHARED["llava"]().model)
    assert may_leave_unused(make_model("opt", layerdrop=0.1))
    sizes = {"vocab_size": 99, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    decoder = transformers.BartForCausalLM(transformers.BartConfig(**sizes))
    assert may_leave_unused(decoder)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("encoder_attn" not in name)
    assert not may_leave_unused(decoder)
    decoder.config.decoder_layerdrop = 0.1
    assert may_leave_unused(decoder)


def test_ddp_looks_for_none_where_layers_are_recomputed():
    """The older kind of checkpointing hides weights from the graph, and DDP can't look for unused ones with it."""
    model = make_model("llama")
    model.activation_checkpointing_enable({"use_reentrant": True})
    assert not may_leave_unused(model.train())
    assert model.training
