"""The code in docs/drop-in.md, in float64, beside each stack's own way: logits of all positions, then log_softmax.

The stacks are stand-ins with the interface of the version that the page names; torchtune is its own where it is
installed.
"""

import contextlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.tiny import VOCAB, assert_same_gradients, make_model

PAGE = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text()
PAD = 2
# prompt and response of: two chosen, two rejected
LENGTHS = ((3, 6), (5, 2), (3, 1), (5, 7))


def code_of(section: str) -> list[str]:
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(*sections: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for section in sections:
        assert code_of(section)
        for code in code_of(section):
            exec(compile(code, section, "exec"), names)
    return names


OWN = "In your own loop"


def make_batch() -> dict[str, Tensor]:
    """Padded, `[4, T]`, chosen first; the pad token is a token that responses may contain."""
    T = max(map(sum, LENGTHS))
    ids = torch.randint(VOCAB, (4, T))
    ids[2:, :3] = ids[:2, :3]
    mask, labels = torch.zeros_like(ids), ids.clone()
    for row, (prompt, response) in enumerate(LENGTHS):
        mask[row, : prompt + response] = 1
        labels[row, :prompt] = -100
    ids = ids.where(mask == 1, PAD)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.where(mask == 1, -100)}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    policy = make_model("llama").double().eval()
    ref = make_model("llama").double().eval().requires_grad_(False)
    with torch.no_grad():
        for p in ref.parameters():
            p.mul_(1.1)
    return policy, ref


@pytest.fixture(autouse=True)
def without_gradients(models: tuple[Any, Any]) -> None:
    for model in models:
        model.zero_grad(set_to_none=True)


def slow_token_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probs of labels, `[4, T - 1]`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps * (labels != -100)


def slow_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return slow_token_logps(model, batch).sum(1)


def slow_loss(models: tuple[Any, Any], batch: dict[str, Tensor], beta: float = 0.1) -> Tensor:
    logratios = slow_logps(models[0], batch) - slow_logps(models[1], batch)
    return -F.logsigmoid(beta * (logratios[:2] - logratios[2:])).mean()


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(model: nn.Module, fast: Tensor, slow: Tensor) -> None:
    """The values, and the gradients of a function of them that weighs each one otherwise."""
    bound = 1e-10 if slow.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(fast, slow, rtol=bound, atol=bound)
    weights = torch.arange(1, fast.numel() + 1, dtype=fast.dtype).view(fast.shape)
    ours, theirs = (grads(model, (weights * x).sum()) for x in (fast, slow))
    assert_same_gradients(ours, theirs, bound)


def test_every_section_with_code_is_tested_here() -> None:
    sections = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    ours = [s for s in sections if "TRL" not in s and code_of(s)]
    assert ours == [OWN, LIGER, TORCHTUNE, OPENRLHF, OPEN_INSTRUCT, PAPER]


# In your own loop


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])  # phi's head has a bias
def test_token_logps(family: str) -> None:
    names, batch = run(OWN), make_batch()
    model = make_model(family).double().eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logps, output = names["token_logps"](model, names["shift"](batch["labels"]), **inputs)
    assert logps[:, -1].eq(0).all()
    assert_same(model, logps[:, :-1], slow_token_logps(model, batch))
    assert output.logits.shape == (*batch["input_ids"].shape, 1)
    assert model(**inputs).logits.shape[-1] == VOCAB  # the head is itself again


def test_token_logps_refuses_what_it_would_get_wrong() -> None:
    names, batch = run(OWN), make_batch()
    labels, ids = names["shift"](batch["labels"]), batch["input_ids"]
    gemma = make_model("gemma2")
    assert gemma.config.final_logit_softcapping is not None
    with pytest.raises(ValueError, match="the model changes its logits behind the LM head"):
        names["token_logps"](gemma, labels, input_ids=ids)
    wrapped = make_model("llama")
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    with pytest.raises(ValueError, match=r"the LM head must be a plain nn\.Linear, got Sequential"):
        names["token_logps"](wrapped, labels, input_ids=ids)


def test_a_wrapped_model_runs_through_its_wrapper(models: tuple[Any, Any]) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs: Any) -> Any:
            self.calls += 1
            return self.module(**inputs)

    names, batch = run(OWN), make_batch()
    wrapper = Wrapper(models[0])
    fast = names["dpo_step"](wrapper, models[1], batch)[0]
    assert wrapper.calls == 1
    assert_same(models[0], fast, slow_loss(models, batch))


def test_a_step_and_a_loop(models: tuple[Any, Any]) -> None:
    names, batch = run(OWN), make_batch()
    loss, accuracy = names["dpo_step"](*models, batch, beta=0.3)
    assert_same(models[0], loss, slow_loss(models, batch, 0.3))
    logratios = slow_logps(models[0], batch) - slow_logps(models[1], batch)
    assert accuracy == (logratios[:2] > logratios[2:]).double().mean()
    model, twin = (make_model("llama").double() for _ in range(2))
    names["train"](model, models[1], [batch, batch], torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        slow_loss((twin, models[1]), batch).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def pack(batch: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
    kept = batch["attention_mask"][rows].bool()
    lengths = kept.sum(1)
    position_ids = (kept.cumsum(1) - 1)[kept][None]
    packed = {name: batch[name][rows][kept][None] for name in ("input_ids", "labels")}
    return packed | {"position_ids": position_ids, "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int()}


def test_a_packed_batch(models: tuple[Any, Any]) -> None:
    names, batch = run(OWN), make_batch()
    packed = pack(batch)
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    packed["labels"] = packed["input_ids"]  # prompts count too, but nothing predicts the first token of a sequence
    assert_same(models[0], names["packed_logps"](models[0], **packed), slow_logps(models[0], batch))


LIGER = "In the place of Liger's losses"


def test_in_the_place_of_liger(models: tuple[Any, Any]) -> None:
    batch = make_batch()
    assert_same(models[0], run(LIGER)["fused_dpo_step"](*models, batch), slow_loss(models, batch))


# torchtune

TORCHTUNE = "torchtune"


class Decoder(nn.Module):
    """torchtune's TransformerDecoder, as far as the page relies on it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tok_embeddings, self.norm = nn.Embedding(VOCAB, 8), nn.LayerNorm(8)
        if tied:
            embeddings = self.tok_embeddings

            class TiedLinear:
                tied_module = embeddings

                def __call__(self, x: Tensor) -> Tensor:
                    return F.linear(x, self.tied_module.weight)

            self.output: Any = TiedLinear()
        else:
            self.output = nn.Linear(8, VOCAB, bias=False)

    def unembed(self, h: Tensor) -> Tensor:
        return self.output(self.norm(h))  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.tok_embeddings(tokens).cumsum(1).tanh())


def real_torchtune(tied: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchtune")
        from torchtune.models import llama3, llama3_2

    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "max_seq_len": 64}
    make = llama3_2.llama3_2 if tied else llama3.llama3
    return make(vocab_size=VOCAB, intermediate_dim=32, **sizes)  # its norms compute in float32


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Decoder(False).double(), id="stand-in"),
        pytest.param(lambda: Decoder(True).double(), id="stand-in-tied"),
        pytest.param(lambda: real_torchtune(False), id="torchtune"),
        pytest.param(lambda: real_torchtune(True), id="torchtune-tied"),
    ],
)
def test_torchtune(make: Any) -> None:
    torch.manual_seed(0)
    model, batch = make(), make_batch()
    recipe = SimpleNamespace(_device=torch.device("cpu"), activations_handling_ctx=contextlib.nullcontext())
    forward = run(TORCHTUNE)["concatenated_forward"]
    chosen, rejected, *logits = forward(recipe, model, (batch["input_ids"], batch["labels"]))
    all_logits = model(batch["input_ids"])
    labels = batch["labels"][:, 1:]
    slow = all_logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    for side, mean in zip((slice(0, 2), slice(2, 4)), logits, strict=True):
        expected = all_logits[side, :-1][labels[side] != -100].mean()
        torch.testing.assert_close(mean.mean(), expected.detach())
    assert_same(model, torch.cat((chosen, rejected)), slow.sum(1))
    with torch.no_grad():
        ref = forward(recipe, model, (batch["input_ids"], batch["labels"]), activations_handling=False)
    assert not ref[0].requires_grad
    model.output = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="the output layer must be a plain layer, got Sequential"):
        forward(recipe, model, (batch["input_ids"], batch["labels"]))


# The others are modules with one class or a few functions


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def make(name: str, **names: Any) -> ModuleType:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            full = ".".join(parts[:i])
            if full not in sys.modules:
                monkeypatch.setitem(sys.modules, full, ModuleType(full))
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[full])
        vars(sys.modules[name]).update(names)
        return sys.modules[name]

    return make


def sides(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Chosen and rejected apart, each as short as its longest sequence."""
    result = {}
    for side, rows in (("chosen", slice(0, 2)), ("rejected", slice(2, 4))):
        T = int(batch["attention_mask"][rows].sum(1).max())
        result |= {f"{side}_{name}": batch[name][rows, :T] for name in names}
    return result


def pad_and_join(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """concatenated_inputs of open-instruct and of the paper's repository."""
    result = {}
    T = max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))
    for name in [name.removeprefix("chosen_") for name in batch if name.startswith("chosen")]:
        pad = -100 if name == "labels" else 0
        rows = [F.pad(x, (0, T - x.shape[1]), value=pad) for x in (batch[f"chosen_{name}"], batch[f"rejected_{name}"])]
        result[f"concatenated_{name}"] = torch.cat(rows)
    return result


OPENRLHF = "OpenRLHF"


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_openrlhf(packing: bool, models: tuple[Any, Any], module: Any) -> None:
    class DPOTrainer:
        """Its interface, without its training."""

        tokenizer = SimpleNamespace(pad_token_id=PAD)
        strategy = SimpleNamespace(ring_attn_group=None)

        def concatenated_inputs(self, chosen: Tensor, c_mask: Tensor, reject: Tensor, r_mask: Tensor, lens: Any) -> Any:
            T = max(chosen.shape[1], reject.shape[1])
            ids = [F.pad(x, (0, T - x.shape[1]), value=PAD) for x in (chosen, reject)]
            masks = [F.pad(x, (0, T - x.shape[1])) for x in (c_mask, r_mask)]
            return torch.cat(ids), torch.cat(masks), lens * 2

        def concatenated_forward(self, model: Any, *batch: Any) -> Any:
            return "the stack's own"

    module("openrlhf.trainer.dpo_trainer", DPOTrainer=DPOTrainer)
    run(OWN, OPENRLHF)
    batch = make_batch()
    chosen, c_mask, reject, r_mask = sides(batch, "input_ids", "attention_mask").values()
    actor = SimpleNamespace(model=models[0], packing_samples=packing)
    inputs = (actor, chosen, c_mask, reject, r_mask, [prompt for prompt, _ in LENGTHS[:2]])
    *logps, aux_loss, nll = DPOTrainer().concatenated_forward(*inputs)
    slow = slow_logps(models[0], batch)
    assert_same(models[0], torch.stack((*torch.cat(logps), nll)), torch.stack((*slow, own_nll(slow))))
    assert aux_loss == []
    DPOTrainer.strategy = SimpleNamespace(ring_attn_group="group")
    assert DPOTrainer().concatenated_forward(*inputs) == "the stack's own"


def own_nll(logps: Tensor) -> Tensor:
    return -(logps[:2] / torch.tensor([float(n) for _, n in LENGTHS[:2]])).mean()


OPEN_INSTRUCT = "open-instruct"


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_open_instruct(packing: bool, average: bool, models: tuple[Any, Any], module: Any) -> None:
    dpo_utils = module("open_instruct.dpo_utils", concatenated_inputs=pad_and_join)
    module("open_instruct.padding_free_collator", concatenated_inputs=join_packed)
    run(OWN, OPEN_INSTRUCT)
    batch = make_batch()
    given = sides(batch, "input_ids", "attention_mask", "labels")
    if packing:
        given = {}
        for side, rows in (("chosen", slice(0, 2)), ("rejected", slice(2, 4))):
            packed = pack(batch, rows)
            ends = packed.pop("cu_seqlens")
            packed["labels"] = F.pad(packed["labels"], (0, 3), value=-100)  # padded to a fixed number of tokens
            packed["input_ids"] = F.pad(packed["input_ids"], (0, 3))
            packed["position_ids"] = F.pad(packed["position_ids"], (0, 3))
            longest = int(ends.diff().max())
            packed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
            given |= {f"{side}_{name}": x for name, x in packed.items()}
    chosen, rejected, aux_loss = dpo_utils.concatenated_forward(models[0], given, average, packing=packing)
    slow = slow_logps(models[0], batch)
    lengths = torch.tensor([float(n) for _, n in LENGTHS]) if average else 1.0
    assert_same(models[0], torch.cat((chosen, rejected)), slow / lengths)
    assert aux_loss is None


def join_packed(batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """concatenated_inputs of open-instruct's padding-free collator."""
    result = {}
    for name in ("input_ids", "labels", "position_ids"):
        result[f"concatenated_{name}"] = torch.cat([batch[f"chosen_{name}"], batch[f"rejected_{name}"]], 1)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        shifted = batch[f"rejected_{name}"][1:] + batch["chosen_input_ids"].shape[1]
        result[f"concatenated_{name}"] = torch.cat([batch[f"chosen_{name}"], shifted])
    for name in ("max_length_q", "max_length_k"):
        result[f"concatenated_{name}"] = max(batch[f"chosen_{name}"], batch[f"rejected_{name}"])
    return result, len(batch["chosen_cu_seq_lens_k"]) - 1


def test_open_instruct_with_a_router(module: Any) -> None:
    dpo_utils = module("open_instruct.dpo_utils", concatenated_inputs=pad_and_join)
    module("open_instruct.padding_free_collator")
    run(OWN, OPEN_INSTRUCT)
    model, batch = make_model("mixtral").double().eval(), make_batch()
    model.set_experts_implementation("eager")  # the other takes no float64
    given = sides(batch, "input_ids", "attention_mask", "labels")
    chosen, rejected, aux_loss = dpo_utils.concatenated_forward(model, given, output_router_logits=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    slow_aux = model(**inputs, output_router_logits=True).aux_loss
    slow = slow_logps(model, batch)
    assert_same(model, torch.stack((*chosen, *rejected, aux_loss)), torch.stack((*slow, slow_aux)))


PAPER = "The DPO paper's own repository"


def test_the_paper_s_repository(models: tuple[Any, Any], module: Any) -> None:
    trainers = module("trainers", BasicTrainer=type("BasicTrainer", (), {}), concatenated_inputs=pad_and_join)
    run(OWN, PAPER)
    batch = make_batch()
    given = sides(batch, "input_ids", "attention_mask", "labels")
    chosen, rejected = trainers.BasicTrainer().concatenated_forward(models[0], given)
    assert_same(models[0], torch.cat((chosen, rejected)), slow_logps(models[0], batch))
