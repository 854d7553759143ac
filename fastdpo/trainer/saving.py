"""Saving and resuming: checkpoints that are complete or not there, of this run, and made in time before a job ends."""

import contextlib
import functools
import json
import logging
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import TrainOutput

from fastdpo import checks, sharding
from fastdpo.checkpoint import lock, preempt, resume, write
from fastdpo.checkpoint.identity import identity
from fastdpo.checkpoint.manifest import STATE, Damaged, verify, write_manifest
from fastdpo.model import adapters
from fastdpo.model.policy import load_weights
from fastdpo.reference.sync import SyncReference
from fastdpo.report import metrics
from fastdpo.settings.config_file import MANIFEST
from fastdpo.settings.files import write_file
from fastdpo.trainer.failing_together import failing_together
from fastdpo.trainer.packed_trainer import PackedTrainer
from fastdpo.trainer.watch import Watch

logger = logging.getLogger("fastdpo")

_SHARED_SECONDS = 20.0
"""How long a file system that machines share may take to show a file of one machine to the others."""


class SavingTrainer(PackedTrainer):
    """`PackedTrainer` with checkpoints that can be trusted, and with signals that save one before the process ends."""

    _sync: SyncReference | None = None
    _owns_output = False  # what is in output_dir is this trainer's own, so it may train there again

    def __init__(self, **others: Any) -> None:
        self._request: preempt.Request | None = None  # while it trains
        self._stopping = False
        self._pending: tuple[Tensor, torch.Event] | None = None
        self._found: resume.Found | None = None
        self._writing: Path | None = None  # the folder beside, while a checkpoint is written
        self._saved_step = -1
        self._in_epoch = False
        self._place = (0, 0)  # finished passes over the training data, and micro-batches of the pass under way
        super().__init__(**others)
        self.add_callback(Watch(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the newest undamaged one of `output_dir`; "auto" for
                that one if there is one, else the beginning; None for the config's `resume_from_checkpoint`.
            args: as in `transformers.Trainer.train`.
            kwargs: as in `transformers.Trainer.train`.

        Raises:
            ValueError: the checkpoint is damaged or of another run, or `output_dir` has the results of another run or
                is in use by one.
            Preempted: SIGTERM, SIGUSR1 or SIGHUP came, and a checkpoint was saved. It is a SystemExit of code 143.
            FloatingPointError: a loss, gradient or weight was not finite.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        sharding.reshard(self.model)  # an evaluation may have left weights gathered, which differ from their shards
        sharding.forget_engine(self)
        evaluates, self._stopping, self._pending = self.args.eval_on_start, False, None
        with contextlib.ExitStack() as stack:
            self._request = stack.enter_context(preempt.noted())
            stack.enter_context(failing_together(self.args))
            stack.enter_context(sharding.running_no_pickles(self))
            self._found = self._agree(functools.partial(self._begin, wanted, stack))
            self._check_shared()
            folder = None if self._found is None else str(self._found.folder)
            try:
                self.args.eval_on_start = evaluates and folder is None  # the first part of the run has done it
                output: TrainOutput = super().train(folder, *args, **kwargs)
            finally:
                self.args.eval_on_start, self._request = evaluates, None
        return output._replace(training_loss=output.metrics["train_loss"])

    def _begin(self, wanted: str | bool | None, stack: contextlib.ExitStack) -> resume.Found | None:
        folder = Path(self.args.output_dir)
        stack.enter_context(lock.held(folder))
        if not hasattr(self, "_identity"):
            self._identity = identity(self)
        found = resume.begin(
            folder,
            wanted or None,
            self._identity,
            changed=self.args.resume_changed,
            overwrite=self.args.overwrite_output_dir or self._owns_output,
            needed=()
            if self.is_fsdp_enabled
            else ("latest" if self.is_deepspeed_enabled else "optimizer.pt", "scheduler.pt"),
        )
        self._owns_output = True
        return found

    def _check_shared(self) -> None:
        """Make sure that all processes see the checkpoint that the main one has chosen, and will see those to come."""
        if self.args.world_size == 1:
            return
        paths = [] if self._found is None else [self._found.folder / MANIFEST]
        if self.args.save_strategy != "no":
            paths.append(Path(self.args.output_dir) / lock.LOCK)
        for path in paths:
            first_sees = self._agree(functools.partial(_text, path))
            until = time.monotonic() + _SHARED_SECONDS
            while not (sees := _text(path) == first_sees) and time.monotonic() < until:
                time.sleep(0.5)  # network file systems show new files late
            if blind := [i for i, each in enumerate(gather_object([sees])) if not each]:
                raise ValueError(
                    f"process {blind[0]} does not see {path} as process 0 does, so no checkpoint there can be resumed "
                    "from; output_dir must be a folder that all machines share"
                )

    def _agree(self, decide: Callable[[], Any]) -> Any:
        """Return in all processes what the main process decides, or raise its error; the others wait for it."""
        return decide() if self.args.world_size == 1 else sharding.decided_by_first(decide)

    # Save

    def _get_output_dir(self, trial: Any) -> str:
        own: str = super()._get_output_dir(trial)
        return own if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        place = run_dir / f"checkpoint-{self.state.global_step}"
        beside = write.unfinished(place)
        try:
            self._agree(lambda: shutil.rmtree(beside, ignore_errors=True))
            self._writing = beside
            self._together(lambda: self._write(model, trial, run_dir, beside / place.name))
            self._writing = None
            self._agree(lambda: self._finish(beside / place.name, place))
        finally:
            self._writing = None
            if self.is_world_process_zero():
                shutil.rmtree(beside, ignore_errors=True)
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))

    def _write(self, model: nn.Module, trial: Any, run_dir: Path, folder: Path) -> None:
        """Let transformers write its files, and add what a resumed run needs besides."""
        super()._save_checkpoint(model, trial)
        write_file(folder / self._window_name(), json.dumps(self._window()).encode())
        if self._sync is not None:
            self._sync.save(folder, writes=self.args.should_save)
        if (best := self.state.best_global_step) is not None:  # transformers has looked for it in the folder beside
            path = run_dir / f"checkpoint-{best}"
            if best == self.state.global_step or path.exists():
                self.state.best_model_checkpoint = str(path)  # all processes load the best model
                if self.args.should_save:
                    self.state.save_to_json(str(folder / STATE))

    def _finish(self, written: Path, place: Path) -> None:
        write_manifest(written, step=self.state.global_step, run=self._identity)
        write.move_into_place(written, place)
        write.rotate(place.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _together(self, work: Callable[[], None]) -> None:
        """Do something in all processes; if it fails in one, raise an error in all of them."""
        error = None
        try:
            work()
        except Exception as own:
            error = own
        if self.args.world_size > 1:
            errors = [each for each in gather_object([error and f"{type(error).__name__}: {error}"]) if each]
            if errors and error is None:
                raise OSError(f"another process could not save its part of the checkpoint: {errors[0]}")
        if error is not None:
            raise error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing is None:  # else it is not complete yet
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; raise FloatingPointError instead if a loss, a gradient or a weight was not finite."""
        self._check_weights()
        if self._writing is not None:
            self._save_weights(str(output_dir))
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        self._owns_output |= output_dir is None
        with write.replacing_files(folder) if self.args.should_save else contextlib.nullcontext(folder) as hidden:
            self._save_weights(str(hidden))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_weights(self, folder: str) -> None:
        if self.is_deepspeed_enabled:  # transformers needs an engine, and a setting without which ZeRO-3 saves no model
            wanted = functools.partial(adapters.is_saved, self.model)
            self._save(folder, state_dict=sharding.whole_state(self.model, keep=self.args.should_save, wanted=wanted))
        elif self.is_fsdp_enabled and self._writing is None:  # where checkpoints are sharded, it saves no model
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(folder, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # nothing reads this pickle, and a reader would have to run its code; the manifest holds the settings
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _check_weights(self) -> None:
        self._guard.check_now()
        named = self.model.named_parameters()
        bad = checks.first_not_finite((name, x) for name, p in named for x in sharding.plain_parts(sharding.local(p)))
        if self.args.world_size > 1 and sharding.is_sharded(
            self.model
        ):  # another process may have found it in its shards
            bad = next(filter(None, gather_object([bad])), None)
        if bad is not None:
            raise FloatingPointError(
                f"{bad} is not finite after step {self.state.global_step}, though the loss and the gradient were: the "
                "optimizer's update was not. Training stopped, and these weights were not saved. Usual causes: a "
                "learning_rate too high, adam_epsilon=0, or a weight_decay that is not finite."
            )

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        try:
            self._agree(lambda: verify(best))
        except Damaged as damage:
            raise ValueError(
                f"load_best_model_at_end: the best checkpoint {best} is damaged: {damage}. The last checkpoint is "
                f"{best.with_name(f'checkpoint-{self._saved_step}')}."
            ) from damage
        if self.is_deepspeed_enabled or not self._load_plain(best):
            super()._load_best_model()

    # The sums since the last log

    def _window_name(self) -> str:
        return f"window_{self.args.process_index}.json"

    def _window(self) -> dict[str, Any]:
        """Return what was summed since the last log, so that the next record is the same if the run is resumed."""
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "seconds": None if self._clock is None else time.perf_counter() - self._clock,
            "reference_seconds": self._reference_time.since_log(),
            "sums": self._sums.state(),
            "histograms": self.histograms,
            "place": self._place,
            "tokens_per_batch": (self.args.tokens_per_batch if self._memory is None else self._memory.tokens) or 0,
        }

    def _earlier_tokens(self) -> int | None:
        path = None if self._found is None else self._found.folder / self._window_name()
        if path is None or not path.is_file():
            return None
        tokens: int | None = json.loads(path.read_bytes()).get("tokens_per_batch")
        return tokens

    def _restore_window(self) -> None:
        if self._found is None or not (path := self._found.folder / self._window_name()).is_file():
            return
        window = json.loads(path.read_bytes())
        self._tr_loss += window["loss"]
        self._total_loss_scalar, self._globalstep_last_logged = window["total_loss"], window["last_logged"]
        self._clock = None if window["seconds"] is None else time.perf_counter() - window["seconds"]
        self._reference_time.restore(window.get("reference_seconds", 0.0))
        self._sums.restore(window["sums"], self.args.device)
        self.histograms = {
            name: [(step, metrics.Histogram(*parts)) for step, parts in kept]
            for name, kept in window["histograms"].items()
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; at the end of a run that a signal stopped, raise `Preempted` instead."""
        if "train_loss" in logs:
            if self._stopping:
                self._raise_preempted()
            self._check_weights()
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)  # of the whole run
        super().log(logs, start_time)

    # Resume

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_plain(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_plain(self, folder: Path) -> bool:
        """Load the weights of a checkpoint that `save_pretrained` wrote, and return whether it is one."""
        is_plain = not self.is_fsdp_enabled and not adapters.is_peft_model(self.model)
        if is_plain:
            load_weights(self.model, folder)
        return is_plain

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of the next step; none if a run is resumed that has made all its steps."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        batches: tuple[list[Any], Any] = super().get_batch_samples(*args, **kwargs)
        self._place = (self._place[0], self._place[1] + len(batches[0]))
        return batches

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the finished passes over the data, and the micro-batches of the next pass that are to be skipped.

        transformers computes both from the step and the length of the data, and a stream has no length.
        """
        self._place = super()._init_training_state(*args, **kwargs)
        if self._found is not None and not isinstance(self.train_dataset, Dataset) and not self.args.ignore_data_skip:
            path = self._found.folder / self._window_name()
            saved = json.loads(path.read_bytes()).get("place") if path.is_file() else None
            self._place = self._place if saved is None else tuple(saved)
        return self._place

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule, and keep the settings of the optimizer, which a checkpoint's will replace."""
        scheduler = super().create_scheduler(*args, **kwargs)
        groups = self.optimizer.param_groups
        self._own_groups = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        base_lrs = list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._sync is not None:
            self._sync.load(checkpoint)
        if checkpoint is None or self._found is None or not self._found.new_optimizer_settings:
            return
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"{'; '.join(self._found.new_optimizer_settings)} can't be applied to a resumed run with "
                f"lr_scheduler_type={self.args.lr_scheduler_type}; set it back"
            )
        lrs = [lr * f(scheduler.last_epoch) for lr, f in zip(base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.base_lrs, scheduler._last_lr = base_lrs, lrs
        for group, own, lr in zip(self.optimizer.param_groups, self._own_groups, lrs, strict=True):
            group.update(own | {"lr": lr})

    # Signals

    def _must_stop(self) -> bool:
        """Return whether a signal came to any process; all processes get the same answer at the same step.

        With several processes on accelerators, the answer is that of one step before, so that nobody waits for it.
        """
        if self._request is None:
            return False
        came = self._request.signum is not None
        if self.args.world_size == 1:
            return came
        flag = torch.full((1,), float(came), device=self.args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.device.type == "cpu":
            return bool(flag.item())
        host, event = flag.to("cpu", non_blocking=True), torch.Event(flag.device)
        event.record()
        before, self._pending = self._pending, (host, event)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0].item())

    def _raise_preempted(self) -> None:
        request = self._request or preempt.Request()
        if self.is_world_process_zero():
            logger.warning(
                "stopped by %s after step %d of %d; checkpoint-%d is saved, and resume_from_checkpoint=auto continues "
                "from it",
                *(request, self.state.global_step, self.state.max_steps, self._saved_step),
            )
        raise preempt.Preempted(request.signum or signal.SIGTERM)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # with save_strategy="best" its result decides whether a checkpoint is saved
        return bool(super()._determine_best_metric(metrics, trial)) or self._stopping


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else str(path.parent.is_dir())
