"""The callback that ends a training after a signal."""

from typing import Any

from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Stops a training at the end of a step, or after an evaluation, if a signal came.

    Args:
        trainer: a `fastdpo.trainer.saving.SavingTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._restore_window()
        self._is_first_pass = True
        self._steps_before = state.global_step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._in_epoch = True
        if not self._is_first_pass:
            self._trainer._place = (self._trainer._place[0] + 1, 0)
        self._is_first_pass = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer._stopping or trainer._must_stop():
            trainer._stopping = control.should_training_stop = True
            # at the end of an epoch, what is due then is still logged and evaluated before the checkpoint is saved
            ends = trainer._in_epoch and trainer.accelerator.gradient_state.end_of_dataloader
            control.should_save = control.should_save or not ends

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            self.on_step_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._in_epoch = False
        if state.global_step == self._steps_before:  # nothing was left to do
            control.should_log = control.should_evaluate = control.should_save = False
        elif trainer._stopping and trainer._saved_step == state.global_step:
            trainer._raise_preempted()
        elif trainer._stopping:
            control.should_save = True
