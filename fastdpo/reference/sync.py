"""TR-DPO: a reference that follows the policy, https://arxiv.org/abs/2404.09656."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn
from transformers import TrainerCallback

from fastdpo.reference.cache import write_file
from fastdpo.reference.policies import is_peft_model

FILE = "reference.safetensors"


def check_sync(model: Any, *, alpha: float, every: int, precompute: bool, needs_reference: bool = True) -> None:
    """Raise where the reference cannot follow the policy.

    Raises:
        ValueError: `ref_model_mixup_alpha` or `ref_model_sync_steps` out of range, a PEFT model, precomputed
            references, or an objective without a reference.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"ref_model_mixup_alpha must be above 0 and at most 1, got {alpha}")
    if every < 1:
        raise ValueError(f"ref_model_sync_steps must be at least 1, got {every}")
    reason = None
    if precompute:
        reason = "precompute_ref_log_probs=True, whose values would be stale after the first sync"
    elif is_peft_model(model):
        reason = "a PEFT model, which has no reference of its own weights"
    elif not needs_reference:
        reason = "an objective that uses no reference"
    if reason:
        raise ValueError(f"sync_ref_model=True cannot be combined with {reason}; set sync_ref_model=False")


@torch.no_grad()
def mix_into(ref_model: nn.Module, model: nn.Module, alpha: float) -> None:
    """`ref = alpha * policy + (1 - alpha) * ref`, parameter by parameter, in place; alpha=1 copies the policy."""
    policy = dict(model.named_parameters())
    for name, parameter in ref_model.named_parameters():
        new = policy[name].detach().to(parameter.device)
        if alpha == 1:
            parameter.copy_(new)
        else:
            # in float32: a bfloat16 sum would lose what is less than 1/256 of the weight
            parameter.copy_(torch.lerp(parameter.float(), new.float(), alpha).to(parameter.dtype))


class SyncReference(TrainerCallback):
    """Mixes the policy into the reference after every so many optimizer steps, and keeps it in checkpoints.

    Args:
        ref_model: the reference of full fine-tuning, unwrapped.
        alpha: `ref_model_mixup_alpha`, the policy's share; the paper's soft update. 1 is its hard update.
        every: `ref_model_sync_steps`: after steps `every`, `2 * every`, ...
    """

    def __init__(self, ref_model: nn.Module, *, alpha: float, every: int) -> None:
        self.ref_model, self.alpha, self.every = ref_model, alpha, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sync, where it is time to."""
        if state.global_step % self.every == 0:
            model = kwargs["model"]
            mix_into(self.ref_model, getattr(model, "module", model), self.alpha)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the reference beside the policy: a resumed run cannot make it again."""
        if state.is_world_process_zero:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def save(self, folder: Path) -> None:
        """Write the reference's weights."""
        weights = {name: p.detach().cpu().contiguous() for name, p in self.ref_model.named_parameters()}
        write_file(folder / FILE, save(weights))

    def load(self, folder: Path | str) -> None:
        """Read them back.

        Raises:
            ValueError: the folder has none, or they are another model's.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {FILE}: it was not saved with sync_ref_model=True, so it can't resume")
        weights = load(path.read_bytes())
        own = dict(self.ref_model.named_parameters())
        if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in own.items()}:
            raise ValueError(f"{path} holds the weights of another model")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
