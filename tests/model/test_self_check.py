"""fastdpo.model.self_check: it passes what is exact, and fails what is not."""

import copy
import logging

import pytest
import torch
import transformers

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model import body_and_head
from fastdpo.model.layout import layout_of
from fastdpo.model.scoring_forward import find_head, patch_forward
from fastdpo.model.self_check import self_check
from tests.helpers.tiny import PAIRS, VOCAB, make_model, make_pairs

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def check(model, layout="shared", pairs=PAIRS, **options):
    return self_check(model, shared_prefix_batch(pairs, layout=layout), layout=layout, **options)


def make_patched(family="llama", **overrides):
    model = make_model(family, **overrides)
    patch_forward(model)
    return model


def make_bert(**options):
    config = transformers.BertConfig(
        **SIZES, intermediate_size=48, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **options
    )
    model = transformers.BertLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3-window", "qwen2-moe-window", "phi"])
def test_passes_what_is_exact(family, layout):
    result = check(make_patched(family), layout)
    assert result.layout == layout
    assert max(result.head_error, result.layout_error) < 1e-5 < result.bound < 1e-2
    assert result.attention_layers == 2
    assert f"{result.head_error:.1e} nats from the model's own forward" in str(result)


def test_passes_in_bfloat16_with_a_bound_of_its_rounding():
    model = make_model("llama").bfloat16()
    patch_forward(model)
    result = check(model)
    assert 1e-3 < max(result.head_error, result.layout_error) <= result.bound < 2


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_passes_in_bfloat16_a_model_that_is_sure_of_the_first_rows(layout):
    """Their log-probs are near 0, while those of any other tokens are large, and rounded by as much more."""
    model = make_model("llama", hidden_size=48)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "embed" in name or "norm" in name else 0.1)
        model.lm_head.weight.copy_(8 * model.model.embed_tokens.weight.roll(1, 0))  # a token answers the one before it
    model.bfloat16()
    patch_forward(model)
    count = list(range(10, 40))
    pairs = [{"prompt_ids": count[:5], "chosen_ids": count[5:], "rejected_ids": count[5:12]}]
    logps = model(**shared_prefix_batch(pairs, layout=layout)).logps
    assert logps.min() > -0.1
    assert check(model, layout, pairs).layout == layout


def test_looks_at_so_many_positions(monkeypatch):
    model = make_patched()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    check(model, pairs=make_pairs([(5, 0, 90, 70), (3, 0, 60, 50)]), positions=20)
    assert max(seen) <= 2 * 30  # two tiny pairs have 30 responses' tokens; a sequence's logits are of scored rows only


def test_leaves_no_trace():
    model = make_patched(attention_dropout=0.1)
    model.model.layers[0].eval()
    training = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    attention = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["fastdpo"]
    check(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == training
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["fastdpo"] is attention


# Heads


def test_catches_a_hook_on_the_head():
    model = make_patched()
    model.lm_head.register_forward_hook(lambda _, args, output: 1.5 * output if output.ndim > 1 else output)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM: .* differ from the model's own forward by .* nats \(bound"
    ):
        check(model, fallback=True)
    patch_forward(model)  # which now leaves the head to the model
    assert "its log-probs differ by" in find_head(model).own
    check(model)


class CappedLlama(transformers.LlamaForCausalLM):
    """Its logits have a soft-cap that no config names."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output


class ScaledLlama(transformers.LlamaForCausalLM):
    """So has the factor of its logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 0.9 * output.logits
        return output


@pytest.mark.parametrize("cls", [CappedLlama, ScaledLlama], ids=["softcap", "scale"])
def test_catches_a_change_of_the_logits_that_no_config_names(cls, monkeypatch, caplog):
    model = make_model("llama")
    model.__class__ = cls
    twin = copy.deepcopy(model)
    patch_forward(model)
    assert "the logits are computed in chunks by the model's own head: its log-probs differ by" in caplog.text
    check(model)
    # without the probe at patching, the check is what is left
    monkeypatch.setattr(body_and_head, "can_probe", lambda _: False)
    patch_forward(twin)
    assert find_head(twin).own is None
    with pytest.raises(ValueError, match="differ from the model's own forward by"):
        check(twin, fallback=True)


# Layouts


def make_nemotron():
    config = transformers.NemotronConfig(**SIZES, num_key_value_heads=2, intermediate_size=48, pad_token_id=0)
    return transformers.NemotronForCausalLM(config)


def make_roberta():
    config = transformers.RobertaConfig(
        **SIZES, intermediate_size=48, is_decoder=True, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
    )
    return transformers.RobertaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(make_nemotron, "NemotronAttention got no packing metadata", id="drops-kwargs"),
        pytest.param(make_roberta, "differ from those of padded rows by", id="positions-of-its-own"),
    ],
)
def test_falls_back_to_padded_rows_aloud(make, reason, caplog):
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert layout_of(model)[0] == "shared"
    patch_forward(model)
    with pytest.raises(ValueError, match=rf"is not exact in layout 'shared': .*{reason}.*; use padded rows"):
        check(model)
    with caplog.at_level(logging.WARNING, "fastdpo"):
        result = check(model, fallback=True)
    assert result.layout == "padded"
    assert reason in result.reason
    assert reason in caplog.text
    assert check(model, "padded").layout == "padded"


def test_memory_that_runs_out_is_no_reason_for_more_of_it(monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("no more")

    model = make_patched()
    batch = shared_prefix_batch(PAIRS)
    monkeypatch.setattr("fastdpo.model.attention.backends.attend", run_out)
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        self_check(model, batch, layout="shared", fallback=True)


def test_catches_an_attention_that_is_never_called():
    """As Bloom's is, if it said that it supports the interface: one layer here looks at its own token alone."""
    model = make_patched()
    layer = model.model.layers[1].self_attn

    def forward(hidden_states, **_):
        values = layer.v_proj(hidden_states).unflatten(-1, (2, 8)).repeat_interleave(2, dim=-2)
        return layer.o_proj(values.flatten(-2)), None

    layer.forward = forward  # exact in every layout, but not what is known to be
    with pytest.raises(ValueError, match=r"1 of its 2 attention layers \(LlamaAttention\) never call fastdpo's att"):
        check(model)
    assert check(model, fallback=True).layout == "padded"


def test_catches_bloom_that_would_say_it_can_be_packed(monkeypatch):
    monkeypatch.setattr(transformers.BloomForCausalLM, "_supports_attention_backend", True)
    monkeypatch.setattr(transformers.BloomForCausalLM, "_can_set_attn_implementation", classmethod(lambda _: True))
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config)
    patch_forward(model)
    result = check(model, fallback=True)
    assert result.layout == "padded"
    assert result.reason


def test_refuses_a_model_that_looks_ahead():
    model = make_bert(is_decoder=False)
    patch_forward(model)
    with pytest.raises(ValueError, match=r"BertLMHeadModel: log-probs differ by .* so it looks ahead; set is_decoder"):
        check(model, "padded", fallback=True)
    model = make_bert(is_decoder=True)
    patch_forward(model)
    assert check(model).layout == "shared"


def test_refuses_a_model_that_sees_its_padding():
    model = make_model("llama")
    own = model.model.forward

    def forward(input_ids, attention_mask=None, **kwargs):
        output = own(input_ids, attention_mask, **kwargs)
        output.last_hidden_state = output[0] + 0.5 * (input_ids == 0).sum()
        return output

    model.model.forward = forward
    patch_forward(model)
    with pytest.raises(ValueError, match="padded rows differ from"):
        check(model, "padded", fallback=True)
