"""What `fastdpo doctor` says of devices, head and attention, and of a model that is to be trained on them."""

import importlib
import os
import shutil
import textwrap
from importlib import metadata
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoConfig

from fastdpo.commands.doctor.findings import Findings
from fastdpo.commands.doctor.head_check import Row, check_head, dtypes, impls, is_accurate
from fastdpo.head.autotune import has_gluon
from fastdpo.head.op import implementation
from fastdpo.model.attention import backends
from fastdpo.model.layout import layout_of
from fastdpo.model.policy import disable_dropout
from fastdpo.model.scoring_forward import find_head
from fastdpo.plan.memory import meta_model
from fastdpo.report import facts
from fastdpo.report.page import summary_table
from fastdpo.settings.failures import loading

GIB = 2**30
SOFTCAP = 50.0
"""A soft-cap of attention scores, as Gemma 2 has it."""


def check_devices(found: Findings) -> torch.device:
    """Describe all devices, and return the one on which a training would run."""
    found.heading("devices")
    device: torch.device = PartialState().device  # as transformers' Trainer finds it
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = (n / GIB for n in torch.cuda.mem_get_info(i))
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        has_bf16 = torch.bfloat16 in dtypes(torch.device("cuda", i))
        found.line(
            f"cuda:{i}",
            f"{properties.name}, {free:.1f} of {total:.1f} GiB free, capability {properties.major}.{properties.minor}, "
            f"{kind}, {'with' if has_bf16 else 'without'} bfloat16",
        )
        if not has_bf16:
            found.advice.append(f"cuda:{i} has no bfloat16: train with --fp16, or with --no_bf16 in float32")
    found.line("cpu", f"{facts.cpu_name()}, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}{_memory()}")
    found.line("trained on", str(device))
    if device.type == "cpu" and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
        why = "is built for the CPU" if not (torch.version.cuda or torch.version.hip) else "can't use it"
        found.advice.append(f"this machine has a GPU, but torch {torch.__version__} {why}: install torch for this GPU")
    return device


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB"
    except (AttributeError, ValueError, OSError):
        return ""


def check_serving(device: torch.device, found: Findings) -> None:
    """Say which head and attention serve on a device, and compare the head with plain PyTorch on it."""
    found.heading("what serves")
    names = impls(device)
    if len(names) > 1:
        found.line("head", f"{' or '.join(names)}: the faster one, timed on the first calls of a shape")
    else:
        module = implementation("auto", device).__name__.rpartition(".")[2]
        why = "Triton is not installed" if device.type == "cuda" else f"the others run on CUDA, not on {device.type}"
        found.line("head", f"{module}: {why}")
    if device.type == "cuda" and len(names) == 1:
        found.advice.append("pip install triton: without it, the head runs in PyTorch on this GPU, which is slower")
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") == "1":
        found.advice.append("unset TRITON_INTERPRET, which lets an interpreter on the CPU run the Triton kernels")
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) == (9, 0):
        found.line("Gluon", _gluon())
    _check_attention(device, found)

    found.heading("the head against plain PyTorch: relative errors against float64")
    total = (len(names) + 1) * len(dtypes(device))
    rows = list(tqdm(check_head(device, names), total=total, desc="comparing", leave=False))
    plain = {row.dtype: row for row in rows if row.impl == "eager"}
    wrong = [row for row in rows if not is_accurate(row, plain[row.dtype])]
    headers = ("dtype", "head", "log-probs", "gradients", "ms", "MiB")
    print(summary_table([_cells(row) for row in rows], headers))  # noqa: T201
    for row in wrong:
        what = textwrap.shorten(row.failure, 300) if row.failure else "its errors are more than twice PyTorch's own"
        found.faults.append(f"{'plain PyTorch' if row.impl == 'eager' else row.impl} in {_name(row.dtype)}: {what}")
    if not wrong:
        found.line("accurate", "every error is at most twice PyTorch's own, or rounding")
    if "triton" in names:
        _check_triton([row for row in wrong if row.impl in names and row.failure], found)


def _gluon() -> str:
    """Say whether the head may take its warp-specialised forward."""
    if not has_gluon():
        return "this Triton can't compile the warp-specialised forward"
    if os.environ.get("FASTDPO_GLUON", "0") == "1":
        return "the warp-specialised forward is timed too, as FASTDPO_GLUON=1 allows; it is not tested on a GPU yet"
    return "the warp-specialised forward is not tested on a GPU yet; FASTDPO_GLUON=1 lets the head time it too"


def _cells(row: Row) -> tuple[str, ...]:
    name = "PyTorch" if row.impl == "eager" else row.impl
    if row.failure:
        return _name(row.dtype), name, "failed", "", "", ""
    peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return (
        _name(row.dtype),
        name,
        f"{row.logps_error:.1e}",
        f"{row.gradients_error:.1e}",
        f"{row.milliseconds:.1f}",
        peak,
    )


def _check_triton(failed: list[Row], found: Findings) -> None:
    found.line("Triton", "can't run its kernels here" if failed else "compiles its kernels here")
    if failed and not any(map(shutil.which, ("cc", "gcc", "clang", os.environ.get("CC", "cc")))):
        found.advice.append("install a C compiler, such as gcc: Triton compiles the launcher of each kernel with it")
    elif failed:
        found.advice.append("until Triton works, train with --head_impl torch")


def _check_attention(device: torch.device, found: Findings) -> None:
    usable = backends.usable("auto", device)
    served: dict[str, list[str]] = {}
    for softcap in (None, SOFTCAP):
        for dtype in dtypes(device):
            name = attention_of(usable, dtype, (64, 64), softcap)
            served.setdefault(name, []).append(_name(dtype) + " with soft-caps" * (softcap is not None))
    for name, cases in served.items():
        found.line("attention", name if len(served) == 1 else f"in {', '.join(cases)}: {name}")
    try:
        version = metadata.version("flash-attn")
        importlib.import_module("flash_attn")
    except metadata.PackageNotFoundError:
        if device.type == "cuda":
            found.advice.append("pip install 'fastdpo[flash]' before training models with soft-caps, such as Gemma 2")
    except Exception as error:  # a binary for another torch may fail in any way
        text = textwrap.shorten(" ".join(str(error).split()), 200)
        found.advice.append(f"flash-attn {version} can't be imported, so build it again for this torch: {text}")


def attention_of(usable: backends.Usable, dtype: torch.dtype, sizes: tuple[int, int], softcap: float | None) -> str:
    """Return the attention backend of a layer, and why there is no better one.

    Args:
        usable: the backends that the device can run.
        dtype: in which the layer computes.
        sizes: heads' sizes, of queries and of values.
        softcap: bound of its scores, or None.
    """
    query, value = (torch.empty(1, 1, size, dtype=dtype) for size in sizes)
    options: dict[str, Any] = {"scaling": None, "window": None, "softcap": softcap, "sinks": None}
    name, against = backends.choose_backend(usable, query, value, **options)
    return name + f" ({against})" * bool(against)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(model: str, device: torch.device, found: Findings) -> None:
    """Say how a model would be trained: its batches, its head and its attention; only its config is read.

    Raises:
        OSError: the config can't be read.
    """
    found.heading(f"training {model}")
    with loading("model", model):
        config = AutoConfig.from_pretrained(model)
    try:
        skeleton = meta_model(config)
        disable_dropout(skeleton)
        layout, reason = layout_of(skeleton)
        head = find_head(skeleton)
    except ValueError as error:
        why = textwrap.shorten(str(error), 300)
        found.line("refused", why)
        found.faults.append(f"{model} can't be trained: {why}")
        return
    found.line("class", f"{type(skeleton).__name__}, {skeleton.num_parameters() / 1e6:,.1f} M parameters")
    found.line("batches", f"{layout}: {reason}")
    text = config.get_text_config()
    ties = "tied to the embeddings" if getattr(text, "tie_word_embeddings", False) else "apart from the embeddings"
    kind = f"the model's own, because {head.own}" if head.own else "fused"
    found.line("head", f"{kind}; {text.vocab_size:,} tokens, {ties}")
    heads = getattr(text, "num_attention_heads", None)
    if layout == "padded" or not isinstance(heads, int) or not heads:
        return
    size = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None) or text.hidden_size // heads
    sizes = size, getattr(text, "v_head_dim", None) or size
    softcap = getattr(text, "attn_logit_softcapping", None)
    usable = backends.usable("auto", device)
    for dtype in dtypes(device):
        found.line("attention", f"in {_name(dtype)}: {attention_of(usable, dtype, sizes, softcap)}")
