"""Let the reference follow the policy during training: TR-DPO, https://arxiv.org/abs/2404.09656."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import TrainerCallback

from fastdpo.data.columns import REFERENCES
from fastdpo.model.adapters import is_peft_model
from fastdpo.settings.files import write_file
from fastdpo.sharding import change, plain_name, reshard, set_whole, shape_of, whole

FILE = "reference.safetensors"


def sync_reference(model: Any, ref_model: nn.Module | None, args: Any, *, has_logps: bool) -> "SyncReference":
    """Return the callback that mixes the policy into the reference.

    Args:
        model: the policy.
        ref_model: its reference.
        args: settings of the run.
        has_logps: whether the training dataset holds the reference's log-probs.

    Raises:
        ValueError: the reference cannot follow the policy.
    """
    check_sync(model, ref_model)
    if ref_model is None or has_logps:
        raise ValueError(
            "sync_ref_model=True needs a reference to change, but the training dataset holds its log-probs; remove the "
            f"columns {', '.join(sorted(REFERENCES))}, or set sync_ref_model=False"
        )
    return SyncReference(ref_model, alpha=args.ref_model_mixup_alpha, every=args.ref_model_sync_steps)


def check_sync(model: Any, ref_model: nn.Module | None) -> None:
    """Raise a ValueError if the reference cannot follow the policy; the config has checked all that needs no model."""
    if is_peft_model(model):
        raise ValueError(
            "sync_ref_model=True needs a reference with weights of its own, but with PEFT there is none; set "
            "sync_ref_model=False, or train all weights"
        )
    if ref_model is None:
        return
    policy, reference = ({n: shape_of(p) for n, p in m.named_parameters()} for m in (model, ref_model))
    apart = [name for name in reference | policy if policy.get(name) != reference.get(name)]
    if apart:
        name = apart[0]
        raise ValueError(
            f"sync_ref_model=True needs a reference with the policy's weights by name and shape, but {name} is "
            f"{reference.get(name, 'not')} in ref_model and {policy.get(name, 'not')} in the model, {len(apart)} in "
            "all; leave ref_model out, or set sync_ref_model=False"
        )


def mix_into(ref_model: nn.Module, model: nn.Module, alpha: float) -> None:
    """Set `ref = alpha * policy + (1 - alpha) * ref` for each parameter, in place; alpha=1 copies the policy."""
    reshard(model)
    reshard(ref_model)
    policy = {plain_name(name): parameter for name, parameter in model.named_parameters()}

    def mixed(old: Tensor, new: Tensor) -> Tensor:
        # in float32, because a bfloat16 sum would lose changes below 1/256 of the weight
        return new if alpha == 1 else torch.lerp(old.float(), new.float(), alpha).to(old.dtype)

    for name, parameter in ref_model.named_parameters():
        change(parameter, policy[plain_name(name)], mixed)


class SyncReference(TrainerCallback):
    """Callback that mixes the policy into the reference at fixed intervals.

    Args:
        ref_model: the reference of full fine-tuning, unwrapped.
        alpha: `ref_model_mixup_alpha`, the policy's weight in the mix; below 1 this is the paper's soft update, at 1
            its hard update.
        every: `ref_model_sync_steps`; the reference changes after optimizer steps `every`, `2 * every`, ...
    """

    def __init__(self, ref_model: nn.Module, *, alpha: float, every: int) -> None:
        self.ref_model, self.alpha, self.every = ref_model, alpha, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mix the policy into the reference, if it is time for that."""
        if state.global_step % self.every == 0:
            model = kwargs["model"]
            mix_into(self.ref_model, getattr(model, "module", model), self.alpha)

    def save(self, folder: Path, *, writes: bool = True) -> None:
        """Write the reference's weights to a checkpoint, because a resumed run cannot make them again.

        Args:
            folder: the checkpoint.
            writes: whether this process writes; where the reference is sharded, the others must call this too.
        """
        reshard(self.ref_model)
        weights = {}
        for name, parameter in self.ref_model.named_parameters():
            value = whole(parameter)
            if writes:
                weights[plain_name(name)] = value.cpu().contiguous()
        if writes:
            write_file(folder / FILE, save(weights))

    def load(self, folder: Path | str) -> None:
        """Read the reference's weights from a folder.

        Raises:
            ValueError: the folder has none, or they are another model's.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {FILE}: it was not saved with sync_ref_model=True, so it can't resume")
        weights = load(path.read_bytes())
        reshard(self.ref_model)
        own = {plain_name(name): p for name, p in self.ref_model.named_parameters()}
        if {n: tuple(w.shape) for n, w in weights.items()} != {n: shape_of(p) for n, p in own.items()}:
            raise ValueError(f"{path} holds the weights of another model")
        for name, parameter in own.items():
            set_whole(parameter, weights[name])
