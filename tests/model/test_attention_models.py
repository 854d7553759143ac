"""Whole models whose attention has soft-caps or sinks, and the silent traps of packing that attention guards against.

A trap is a call that transformers takes without complaint and computes wrongly. Each is sprung here, and then shown
to be impossible, or without effect, on a patched model.
"""

import logging

import pytest
import torch
from transformers import DynamicCache

from fastdpo.data.packing import shared_prefix_batch
from fastdpo.model.attention import registered
from fastdpo.model.scoring_forward import patch_forward
from tests.helpers.packed import assert_equals_separate_sequences, make_patched
from tests.helpers.tiny import (
    PAIRS,
    WINDOW,
    make_model,
    stock,
    stock_logps,
)

ODD = {
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    "gpt-oss": {},
}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "checkpointed"])
@pytest.mark.parametrize("family", list(ODD))
def test_equals_separate_sequences(family, checkpointing):
    model, reference = make_patched(family, **ODD[family])
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    if checkpointing is not None:
        # its name from transformers 5.23 on
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": checkpointing})
    batch = shared_prefix_batch(PAIRS)
    assert_equals_separate_sequences(model, reference, batch)


@pytest.mark.parametrize("family", list(ODD))
def test_padded_batches_and_generation_are_the_stock_models(family):
    model, reference = make_patched(family, **ODD[family])
    model.eval(), reference.eval()
    ids = torch.randint(3, 100, (2, 17))
    for padding in (torch.arange(17) >= torch.tensor([[0], [4]]), torch.arange(17) < torch.tensor([[17], [9]])):
        logits = model(input_ids=ids, attention_mask=padding.long()).logits
        expected = reference(input_ids=ids, attention_mask=padding.long()).logits
        torch.testing.assert_close(logits[padding], expected[padding], rtol=0, atol=2e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    padding = (torch.arange(17) >= torch.tensor([[0], [4]])).long()
    tokens = model.generate(ids, attention_mask=padding, **options)
    assert torch.equal(tokens, reference.generate(ids, attention_mask=padding, **options))


def test_one_line_says_which_attention(caplog):
    caplog.set_level(logging.INFO, "fastdpo")
    registered._say.cache_clear()
    model, _ = make_patched("gemma2", **ODD["gemma2"])
    for _ in range(2):
        model(**shared_prefix_batch(PAIRS))
    (line,) = [message for message in caplog.messages if message.startswith("attention")]
    assert line.startswith("attention of Gemma2Attention: matmuls and a softmax in float32, because it has soft-caps")


# Silent traps


def stock_hidden(model, attn_implementation="sdpa", **inputs):
    """Hidden states of a packed batch through what transformers has."""
    model.set_attn_implementation(attn_implementation)
    return model.model(**inputs).last_hidden_state[0]


def assert_guarded(family="llama", **overrides):
    """A patched model scores the batch like separate sequences."""
    model, reference = make_patched(family, **overrides)
    torch.testing.assert_close(
        model(**shared_prefix_batch(PAIRS)).logps, stock_logps(reference, PAIRS), rtol=0, atol=1e-5
    )


def expected_hidden(model, batch):
    """Right ones, from a patched copy."""
    model = stock(model)
    patch_forward(model)
    with registered.packing():
        return model.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            **registered.layer_kwargs(batch),
        ).last_hidden_state[0]


def test_trap_a_cache_turns_off_the_detection_of_sequences():
    batch = shared_prefix_batch(PAIRS, layout="packed")
    model = make_model("llama")
    right = expected_hidden(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    torch.testing.assert_close(stock_hidden(model, use_cache=False, **inputs), right, rtol=0, atol=1e-5)
    assert (stock_hidden(model, use_cache=True, **inputs) - right).abs().max() > 0.1  # the trap
    assert model.config.use_cache  # the default, which no batch of ours is affected by
    patch_forward(model)
    caches = []
    model.model.register_forward_hook(lambda *args: caches.append(args[-1].past_key_values))
    reference = stock(make_model("llama"))
    torch.testing.assert_close(model(**batch).logps, stock_logps(reference, PAIRS), rtol=0, atol=1e-5)
    assert caches == [None]
    with pytest.raises(ValueError, match="takes no past_key_values"):
        model(**batch, past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_trap_stock_attention_loses_the_prompt_of_a_branch(name):
    batch = shared_prefix_batch(PAIRS)
    model = make_model("llama")
    right = expected_hidden(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if name != "flex_attention":  # that one would be compiled
        assert (stock_hidden(model, name, use_cache=False, **inputs) - right).abs().max() > 0.1  # the trap
    patch_forward(model)
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match=f"its attention is '{name}' and not 'fastdpo'"):
        model(**batch)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn3"])
def test_trap_stock_flash_attention_shows_chosen_to_rejected(name):
    """It splits where positions are 0 and nowhere else; packages for it need not be there to be refused."""
    batch = shared_prefix_batch(PAIRS)
    starts = batch["tree_cu_seqlens_q"][:-1]
    assert (batch["position_ids"][0, starts] != 0).any()  # the trap: there flash attention sees no new sequence
    model, _ = make_patched("llama")
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match=f"its attention is '{name}' and not 'fastdpo'"):
        model(**batch)


def test_trap_a_mask_of_four_dimensions_hides_the_window():
    batch = shared_prefix_batch(PAIRS, layout="packed")
    model = make_model("mistral-window")
    right = expected_hidden(model, batch)
    T = batch["input_ids"].shape[1]
    segment = torch.searchsorted(batch["tree_cu_seqlens_q"][1:], torch.arange(T).int(), right=True)
    mask = ((segment[:, None] == segment) & torch.ones(T, T, dtype=torch.bool).tril())[None, None]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    wrong = stock_hidden(model, attention_mask=mask, use_cache=False, **inputs)
    assert (wrong - right).abs().max() > 0.1  # the trap
    patch_forward(model)
    with pytest.raises(ValueError, match="a padded batch takes no tree_cu_seqlens_k"):  # what a mask makes of it
        model(**batch, attention_mask=mask)
    with registered.packing(), pytest.raises(ValueError, match="adds a mask or bias of its own"):
        model.model(attention_mask=mask, use_cache=False, **inputs, **registered.layer_kwargs(batch))
    assert_guarded("mistral-window")


def test_trap_dropout_gives_what_is_shared_one_mask():
    model, _ = make_patched("gemma2", attention_dropout=0.1, **ODD["gemma2"])
    with pytest.raises(ValueError, match="attention dropout must be 0"):
        model(**shared_prefix_batch(PAIRS))
    model.eval()(**shared_prefix_batch(PAIRS))
