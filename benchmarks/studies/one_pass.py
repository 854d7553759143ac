"""Study whether LoRA's policy and reference should share one pass, because they run the same base.

    python -m benchmarks.studies.one_pass            # measure (6 minutes), and write both files
    python -m benchmarks.studies.one_pass --table    # write the table from the numbers in the repository

All ways give the same loss and the same gradients:

- `two passes`: the policy with gradients, and the reference without, with its adapters off. The trainer does this.
- `masked`: the rows of the batch twice in one pass; the adapters' output is multiplied by 0 on the second half. Its
  backward computes zeros for the reference's rows.
- `joint`: the same, but the matmuls with the base's weights skip the reference's rows in the backward, and the adapters
  and the head's backward never see them.
- `precomputed`: the policy alone, with log-probs of the reference that are known.

Time is CPU time of the process, with one thread; the ways take turns, and the least of all rounds counts. Operations
are those that PyTorch dispatches in a step, without views; on a GPU, nearly each of them launches a kernel. FLOPs are
those of matmuls, as `torch.utils.flop_counter` counts them. Memory is what a step needs besides the weights.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from fastdpo import dpo_loss, shared_prefix_batch
from fastdpo.benchmarks.report import replace
from fastdpo.commands.doctor.head_check import peak_memory
from fastdpo.model.adapters import as_reference, with_adapter
from fastdpo.model.body_and_head import fused_scores
from fastdpo.model.scoring_forward import _packed_hidden, find_head, patch_forward
from fastdpo.report.facts import cpu_name

ROOT = Path(__file__).parent.parent.parent
PAGE, NUMBERS = ROOT / "docs/reference.md", ROOT / "benchmarks/results/cpu-2-cores/one_pass.json"
MARK = "<!-- python -m benchmarks.studies.one_pass {} the table of one pass -->\n"

MODELS = {
    "tiny": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "20M": {"vocab_size": 16384, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8}
    | {"num_attention_heads": 6, "num_key_value_heads": 2},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
}
CASES = [("tiny", 50), ("tiny", 400), ("20M", 50), ("20M", 400), ("135M", 50), ("135M", 100)]
"""Models, and tokens of a pair's sequences."""
PAIRS, ROUNDS = 2, 3


def policy(model: str) -> Any:
    """Return a Llama with LoRA of rank 16 on all linear layers but the head, whose adapter is not the identity."""
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**MODELS[model], tie_word_embeddings=True, pad_token_id=0))
    result = with_adapter(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    patch_forward(result)
    return result


def examples(tokens: int, vocab: int) -> list[dict[str, Any]]:
    """Return pairs with prompts of half of the tokens, and responses of the other half."""
    g = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=g).tolist()

    half = tokens // 2
    return [{"prompt_ids": ids(half), "chosen_ids": ids(half), "rejected_ids": ids(half)} for _ in range(PAIRS)]


def loss_of(logps: Tensor, reference: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the mean DPO loss of a batch from the log-probs of its tokens, `[M]` each."""
    sums = [torch.segment_reduce(x.float(), "sum", offsets=batch["cu_target"]) for x in (logps, reference)]
    sides = [x[batch[side]] for x in sums for side in ("chosen", "rejected")]
    return dpo_loss(*sides, beta=0.1).losses.mean()


def two_passes(model: Any, batch: dict[str, Any]) -> Tensor:
    """Run the policy with gradients, and the reference without."""
    with torch.no_grad(), as_reference(model):
        reference = model(**batch).logps
    return loss_of(model(**batch).logps, reference, batch)


class _BaseMatmul(torch.autograd.Function):
    """x W' for all rows, with gradients of the first `rows` rows only; W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: int) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        result = grad.new_zeros(ctx.shape)
        torch.matmul(grad[:, : ctx.rows], ctx.saved_tensors[0], out=result[:, : ctx.rows])
        return result, None, None


def _masked(mask: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * mask


def _joint(layer: Any, rows: int, x: Tensor, *args: Any) -> Tensor:
    result = _BaseMatmul.apply(x, layer.base_layer.weight, rows)
    own = x[:, :rows]
    added = layer.lora_B["default"](layer.lora_A["default"](own)) * layer.scaling["default"]
    return torch.cat((result[:, :rows] + added, result[:, rows:]), 1)


@contextmanager
def _in_one_pass(model: Any, way: str, rows: int) -> Iterator[None]:
    """Inside the block, the adapters change only the first `rows` rows of `[1, 2 rows, D]`."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    mask = (torch.arange(2 * rows) < rows).float()[None, :, None]
    with ExitStack() as stack:
        for layer in layers:
            if way == "masked":
                handle = layer.lora_B["default"].register_forward_hook(partial(_masked, mask))
                stack.callback(handle.remove)
            else:
                layer.forward = partial(_joint, layer, rows)
                stack.callback(vars(layer).pop, "forward")
        yield


def one_pass(model: Any, head: Any, batch: dict[str, Any], doubled: dict[str, Any], way: str) -> Tensor:
    """Run a batch whose rows are there twice, once for the policy and once for the reference."""
    rows = batch["input_ids"].shape[1]
    with _in_one_pass(model, way, rows):
        hidden, _ = _packed_hidden(model.get_base_model(), head.decoder, doubled, {})
    own, other = hidden[:rows].index_select(0, batch["logit_index"]), hidden[rows:].detach()
    logps = fused_scores(head, own, batch["target_ids"], False)
    with torch.no_grad():
        reference = fused_scores(head, other.index_select(0, batch["logit_index"]), batch["target_ids"], False)
    return loss_of(logps, reference, batch)


class Operations(TorchDispatchMode):
    """Counts the operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **kwargs or {})


def ways_of(model: Any, pairs: list[dict[str, Any]]) -> dict[str, Callable[[], Tensor]]:
    """Return a function for each way, which runs a forward and returns the loss."""
    batch = shared_prefix_batch(pairs, pad_to_multiple_of=1)
    doubled = shared_prefix_batch([*pairs, *pairs], pad_to_multiple_of=1)
    head = find_head(model)
    with torch.no_grad(), as_reference(model):
        known = model(**batch).logps
    return {
        "two passes": partial(two_passes, model, batch),
        "masked": partial(one_pass, model, head, batch, doubled, "masked"),
        "joint": partial(one_pass, model, head, batch, doubled, "joint"),
        "precomputed": lambda: loss_of(model(**batch).logps, known, batch),
    }


def gradients(model: Any, forward: Callable[[], Tensor]) -> Tensor:
    """Return the loss and after it the gradients of all adapters, `[1 + parameters]`."""
    model.zero_grad()
    loss = forward()
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def measure(name: str, tokens: int, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return what each way takes on one model and length, after a check that all ways compute the same."""
    model = policy(name)
    ways = ways_of(model, examples(tokens, MODELS[name]["vocab_size"]))
    expected = gradients(model, ways["two passes"])
    rows = []
    for way, forward in ways.items():
        with Operations() as operations, FlopCounterMode(display=False) as flops:
            found = gradients(model, forward)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        memory = peak_memory(partial(gradients, model, forward), torch.device("cpu"))
        counted = {"operations": operations.count, "flops": flops.get_total_flops(), "mib": memory}
        rows.append({"model": name, "tokens": tokens, "way": way, **counted, "seconds": float("inf")})
    for _ in range(rounds):
        for row, forward in zip(rows, ways.values(), strict=True):
            start = time.process_time()
            gradients(model, forward)
            row["seconds"] = min(row["seconds"], time.process_time() - start)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table; all columns but the memory are relative to two passes."""
    lines = ["| model | tokens | way | time | FLOPs | operations | MiB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        case = row["model"], row["tokens"]
        base = next(each for each in rows if (each["model"], each["tokens"], each["way"]) == (*case, "two passes"))
        cells = [f"{row[key] / base[key]:.2f}" for key in ("seconds", "flops", "operations")]
        lines.append(f"| {' | '.join([case[0], str(case[1]), row['way'], *cells, format(row['mib'], ',.0f')])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases unless there is `--table`, and write the table into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--table", action="store_true", help="Measure nothing, and write the tables from the numbers in the repository."
    )
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        measured = {"device": cpu_name(), "torch": torch.__version__, "rows": [r for c in CASES for r in measure(*c)]}
        NUMBERS.write_text(json.dumps(measured, indent=1) + "\n")
    numbers = json.loads(NUMBERS.read_text())
    where = f"\nMeasured on {numbers['device']}, 1 thread, with PyTorch {numbers['torch']}.\n"
    replace(PAGE, MARK.format("writes"), MARK.format("has written"), table(numbers["rows"]) + where)


if __name__ == "__main__":
    main()
