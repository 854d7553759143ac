"""The sweep over all model classes: a few of them, and the document it has written."""

import json

import pytest
import transformers

from benchmarks.studies import model_sweep
from benchmarks.studies.model_sweep import Row, render, sweep, sweep_class
from benchmarks.studies.tiny_configs import NotBuildableError, class_names

EXPECTED = {
    "LlamaForCausalLM": ("shared", "fused"),
    "OPTForCausalLM": ("shared", "fused"),  # its base_model is not what its head follows
    "GPT2LMHeadModel": ("shared", "fused"),
    "BertLMHeadModel": ("shared", "neither in its decoder nor in its output embeddings"),
    "RemBertForCausalLM": ("padded", "neither in its decoder nor in its output embeddings"),  # wider than its body
    "ModernBertDecoderForCausalLM": ("shared", "neither in its decoder nor in its output embeddings"),
    "RecurrentGemmaForCausalLM": ("padded", "fused"),  # logits_soft_cap
    "xLSTMForCausalLM": ("padded", "fused"),  # output_logit_soft_cap
    "InklingForCausalLM": ("padded", "fused"),  # divides hidden states, leaves tokens out
    "FalconMambaForCausalLM": ("padded", "fused"),
    "NemotronForCausalLM": ("padded", "fused"),  # drops the metadata, which the self-check finds
    "BloomForCausalLM": ("padded", "fused"),
    "Gemma3ForConditionalGeneration": ("shared", "fused"),  # it also sees
    "XLNetLMHeadModel": ("refused", ""),  # it looks ahead
    "XLMWithLMHeadModel": ("padded", "fused"),  # without a mask, it would take tokens like the pad token for padding
    "CpmAntForCausalLM": ("refused", ""),  # it sees the padding
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
def test_what_the_sweep_says_of_a_class(name: str) -> None:
    row = sweep_class(name)
    verdict, head = EXPECTED[name]
    assert row.verdict == verdict, row
    assert head in row.head


def test_a_wrong_model_is_called_wrong(monkeypatch) -> None:
    monkeypatch.setattr(model_sweep, "LOGPS_BOUND", 0.0)
    assert sweep_class("LlamaForCausalLM").verdict == "wrong"


def test_failures_are_told_apart(monkeypatch) -> None:
    def fail(error):
        def raise_it(name):
            raise error

        return raise_it

    monkeypatch.setattr(model_sweep, "make_tiny", fail(NotBuildableError("no size is small enough")))
    assert sweep(["A"])[0].verdict == "not buildable"
    monkeypatch.setattr(model_sweep, "make_tiny", fail(KeyError("x")))
    assert sweep(["A"])[0].verdict == "crash"


def test_the_document_lists_every_class_and_nothing_wrong() -> None:
    found = json.loads(model_sweep.NUMBERS.read_text())
    assert model_sweep.DOCUMENT.read_text() == render(found), "run python -m benchmarks.studies.model_sweep --table"
    rows = [Row(**row) for row in found["rows"]]
    assert len(rows) > 100
    if found["provenance"]["transformers"] == transformers.__version__:
        assert [row.name for row in rows] == class_names()
    assert {row.verdict for row in rows} <= {"shared", "tree", "packed", "padded", "refused", "not buildable"}


def test_the_document_counts_its_rows() -> None:
    rows = [Row("A", "shared", "fused", 1e-6, 2e-6), Row("B", "refused", reason="a|b"), Row("C", "wrong", "fused")]
    found = {"rows": [row._asdict() for row in rows], "tree_recurrence": False}
    text = render(found | {"provenance": {"transformers": "6.7"}})
    assert "Of 3 classes, 1 are exact with shared prefixes. 0 more" in text
    assert "1 are refused with an error" in text
    assert "1 give wrong results, and 0 crash." in text
    assert "| A | shared | 1.0e-06 | 2.0e-06 | fused |  |" in text
    assert "| B | refused |  |  |  | a/b |" in text
