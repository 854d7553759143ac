"""Compare tiny models with Liger's kernels in their layers, as `use_liger_kernel` puts them there, with those without.

    TRITON_INTERPRET=1 python -m benchmarks.studies.liger_families [CLASS ...] [--out FILE]

Without a GPU, Triton's interpreter runs the kernels, which takes minutes for all causal-LM classes that Liger knows.
Prints one JSON object a class, and `--out` writes them to a file: the type of the model, the modules that Liger
replaced, and the largest differences of log-probs, in nats, and of gradients, relative to the largest one of the same
weight, on a packed batch in float32.
"""

import argparse
import copy
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.studies.tiny_configs import NotBuildableError, class_names, make_tiny
from fastdpo import DPOConfig, shared_prefix_batch
from fastdpo.benchmarks.harness import save
from fastdpo.compat import liger
from fastdpo.model.layout import Layout, choose_layout
from fastdpo.model.scoring_forward import patch_forward

PAIRS = [
    {"prompt_ids": [1, 9, 40, 17, 5], "chosen_ids": [33, 8, 21, 2], "rejected_ids": [33, 60, 2]},
    {"prompt_ids": [1, 77, 13], "chosen_ids": [4, 2], "rejected_ids": [52, 4, 90, 2]},
]
ROUNDING = 1e-5
"""Gradients below this share of the largest of all are nothing but rounding, and are compared with that one."""


def interpret(setattr: Callable[[Any, str, Any], None]) -> None:
    """Give Triton's interpreter what Liger's kernels need of it: scalars from floats, libdevice, and no timing.

    Args:
        setattr: sets an attribute of an object, as the builtin does.
    """
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import fused_moe_kernels, geglu, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(arg: Any) -> Any:
        if not isinstance(arg, float):
            return convert(arg)
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)

    setattr(interpreter, "_implicit_cvt", with_floats)
    setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # looked up inside of the interpreter
    setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    for kernel in vars(fused_moe_kernels).values():
        if hasattr(kernel, "configs"):
            setattr(kernel, "configs", kernel.configs[:1])


def compare(model: Any) -> dict[str, Any]:
    """Put Liger's kernels into a model and return what changed.

    Args:
        model: a causal LM in float32 as `make_tiny` makes it; it is changed.
    """
    own = copy.deepcopy(model)
    with _restored(sys.modules[type(model).__module__]):
        expected = _alone(own)
        gradients = _gradients(own, expected)
        args = DPOConfig(report_to="none", use_cpu=not torch.cuda.is_available(), use_liger_kernel=True)
        liger.prepare(args)
        liger.apply(model, args)
        patch_forward(model)
        layout = choose_layout([model], True)
        try:
            logps = _scored(model, layout)
        except ValueError:  # a trainer pads, too, where a model can't do without
            logps = _scored(model, layout := "padded")
        found = _gradients(model, logps)
    sizes = {name: gradient.abs().max().item() for name, gradient in gradients.items()}
    largest = max(sizes.values())
    errors = [
        (found[name] - gradient).abs().max().item() / (sizes[name] if sizes[name] > ROUNDING * largest else largest)
        for name, gradient in gradients.items()
    ]
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "replaced": dict(sorted(liger.kinds(model).items())),
        "layout": layout,
        "logps": (logps - expected).abs().max().item(),
        "gradients": max(errors),
    }


@contextmanager
def _restored(module: Any) -> Iterator[None]:
    """Undo what Liger changes in a module of transformers, which all models of the class share."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _alone(model: Any) -> Tensor:
    """Return the log-probs of the responses' tokens `[M]` from the model's own forward, one sequence at a time."""
    device, parts = next(model.parameters()).device, []
    for name in ("chosen_ids", "rejected_ids"):
        for pair in PAIRS:
            ids, first = torch.tensor([pair["prompt_ids"] + pair[name]], device=device), len(pair["prompt_ids"])
            logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            parts.append(logps[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0])
    return torch.cat(parts)


def _scored(model: Any, layout: Layout) -> Tensor:
    batch, device = shared_prefix_batch(PAIRS, layout=layout), next(model.parameters()).device
    logps: Tensor = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}).logps
    return logps


def _gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, len(logps), device=logps.device)
    (weights * logps).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def known_classes() -> list[str]:
    """Return the causal-LM classes of transformers that Liger has kernels for."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    classes = {name: getattr(transformers, name, None) for name in class_names()}
    types = {name: getattr(getattr(cls, "config_class", None), "model_type", None) for name, cls in classes.items()}
    return [name for name, model_type in types.items() if model_type in KNOWN]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="Classes to try (default: all that Liger knows).")
    parser.add_argument("--out", type=Path, help="JSON file to which all rows are written (default: none).")
    args = parser.parse_args(argv)
    rows = []
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("without a GPU, set TRITON_INTERPRET=1")
        interpret(setattr)
    for name in args.classes or known_classes():
        try:
            model = make_tiny(name)
            row = compare(model.cuda() if on_gpu else model)
        except (NotBuildableError, ValueError) as error:
            row = {"class": name, "error": re.sub(r" \(/[^)]*\)", "", " ".join(str(error).split()))}  # no path of here
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        save(args.out, {"rows": rows})


if __name__ == "__main__":
    main()
