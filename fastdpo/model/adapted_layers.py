"""Look into the layers that PEFT has adapted: what adapters add to a head, and which tensors take part.

`adapters` works on whole models: it adds an adapter, checks it and switches it off. This module reads single layers.

Shapes: N rows, D hidden size, V vocabulary, R rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available

from fastdpo.sharding import plain_name


def unwrap(model: Any) -> Any:
    """Return the causal LM inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def puts_prompts_first(model: Any) -> bool:
    """Whether the active adapter puts trained prompts before the tokens."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of all that PEFT wraps in a causal LM: adapted layers, and modules trained as copies."""
    if is_peft_available():
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, wrappers))


# The head


def base_linear(linear: Any) -> Any:
    """Return the Linear inside an adapted layer, or the Linear itself."""
    return linear if isinstance(linear, nn.Linear) else linear.get_base_layer()


def linears_of_head(lm_head: nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the layers that a call of the head may run, and the modules inside them that must be plain Linears.

    Raises:
        ValueError: the head has an adapter whose effect on the logits is no low-rank product; the message says so.
    """
    head: Any = lm_head
    if not isinstance(lm_head, nn.Linear) and is_peft_available():
        from peft.tuners import lora
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(lm_head, lora.Linear) and not lm_head.lora_variant and not any(lm_head.lora_bias.values()):
            return (head,), (head.get_base_layer(),)
        if isinstance(lm_head, BaseTunerLayer):
            name = type(lm_head).__name__
            raise ValueError(
                f"its output embeddings have an adapter ({name}) that is neither plain LoRA nor trained tokens"
            )
        if isinstance(lm_head, TrainableTokensWrapper):  # tied to embeddings of which some rows are trained
            return (head.token_adapter,), (head.original_module,)
        if isinstance(lm_head, ModulesToSaveWrapper):
            copies = (head.original_module, *head.modules_to_save.values())
            return copies, copies
    return (head,), (head,)


def low_rank(linear: Any, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what active adapters add to the head: `hidden2 [N, R]` and `weight2 [V, R]` in the dtype of `hidden`.

    Args:
        linear: a layer of `linears_of_head`.
        hidden: the head's input `[N, D]`.

    Returns:
        The two factors, whose product `hidden2 @ weight2.T` is added to the logits; None without an active adapter.
    """
    if isinstance(linear, nn.Linear) or linear.disable_adapters or linear.merged:
        return None
    add, names = (_lora, "lora_A") if hasattr(linear, "lora_A") else (_trained_tokens, "trainable_tokens_delta")
    parts = [add(linear, name, hidden) for name in linear.active_adapters if name in getattr(linear, names)]
    if not parts:
        return None
    hidden2, weight2 = (torch.cat(factors, 1).to(hidden.dtype) for factors in zip(*parts, strict=True))
    return hidden2, weight2


def _lora(linear: Any, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return `scaling * A(dropout(hidden))` and `B`."""
    a = linear.lora_A[name]
    return linear.scaling[name] * a(linear.lora_dropout[name](hidden.to(a.weight.dtype))), linear.lora_B[name].weight


def _trained_tokens(linear: Any, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the new rows of some tokens add to their logits, and which tokens these are.

    What is added comes as its rounded value and the rounding error, so that in 16 bits the logits of these tokens are
    as exact as the others.
    """
    weight, new = linear.get_base_layer().weight, linear.trainable_tokens_delta[name]
    tokens = torch.tensor(linear.token_indices[name]).to(weight.device, non_blocking=True)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    added = hidden.to(exact) @ (new.to(exact) - weight[tokens].to(exact)).T
    rounded = added.to(hidden.dtype)
    rest = (added - rounded.to(exact)).to(hidden.dtype)
    which = hidden.new_zeros(len(weight), len(tokens)).scatter_(0, tokens[None], 1.0)
    return torch.cat([rounded, rest], 1), torch.cat([which, which], 1)


# All tensors


def tensors_in_use(model: nn.Module) -> tuple[list[tuple[str, Tensor]], dict[str, float]]:
    """Return the tensors that a causal LM computes with now, and the factors of its active adapters.

    Returns:
        The parameters and buffers that take part, sorted by the name they would have without adapters; those of active
        adapters have the adapter's position in their name instead of the adapter's name. And the factor by which each
        adapted layer multiplies each of its active adapters.
    """
    skipped, renamed, factors = _prefixes(model)
    tensors = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(name.startswith(prefix) for prefix in skipped):
            continue
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        tensors.append((plain_name(renamed.get(prefix, "") + name.removeprefix(prefix)), tensor))
    return sorted(tensors, key=lambda pair: pair[0]), factors


def _prefixes(model: nn.Module) -> tuple[set[str], dict[str, str], dict[str, float]]:
    """Return the prefixes of tensors that take no part, new prefixes of others, and the factors of active adapters."""
    skipped: set[str] = set()
    renamed: dict[str, str] = {}
    factors: dict[str, float] = {}
    modules: list[tuple[str, Any]] = list(adapted_modules(model))
    if not modules:
        return skipped, renamed, factors
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in modules:
        if isinstance(layer, BaseTunerLayer):
            active = [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)
            # trained tokens are a layer inside of PEFT's wrapper of the embeddings
            renamed[f"{path}.base_layer."] = path.removesuffix(".token_adapter") + "."
            for part in (*layer.adapter_layer_names, *layer.other_param_names):
                for adapter in _names(getattr(layer, part, None)):
                    prefix = f"{path}.{part}.{adapter}"
                    if adapter in active:
                        renamed[prefix] = f"{path}.{part}.{active.index(adapter)}"
                    else:
                        skipped.add(prefix)
            for i, adapter in enumerate(active):
                if adapter in getattr(layer, "scaling", {}):
                    factors[plain_name(f"{path}.{i}")] = float(layer.scaling[adapter])
        else:
            active = [] if layer.disable_adapters else list(layer.active_adapters)
            copies = _names(getattr(layer, "modules_to_save", None))
            kept = [adapter for adapter in copies if adapter in active]
            for adapter in copies:
                prefix = f"{path}.modules_to_save.{adapter}."
                if adapter in kept:
                    renamed[prefix] = f"{path}."
                else:
                    skipped.add(prefix)
            if kept:
                skipped.add(f"{path}.original_module.")
            else:
                renamed[f"{path}.original_module."] = f"{path}."
    return skipped, renamed, factors


def _names(container: Any) -> list[str]:
    return list(container.keys()) if hasattr(container, "keys") else []
