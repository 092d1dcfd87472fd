"""What happens to one batch: the training step, the test step and the prediction step.

A step is called by the one batch loop (loop.py) with a batch and its index. Steps keep their numbers on the device
and never read one; the loop and the callbacks ask for numbers through `logs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import nn

from fitkit import batch as batches_of
from fitkit.computation import ClassWeight, Compiled, Computation, Outcome, UserStep, transfer_of
from fitkit.device import autocasting, copy_back, random_state, restore_random_state
from fitkit.diagnosis import explain_nonfinite
from fitkit.distributed import Processes, share_tensors
from fitkit.errors import NotNowError
from fitkit.gradients import GradientNorms, clip_gradients
from fitkit.joint_losses import JointLosses
from fitkit.logs import BatchLogs, read
from fitkit.numbers import Numbers
from fitkit.optimization import check_holds_trainable, parameters_of
from fitkit.sharding import Sharding, let_go
from fitkit.synchronisation import Synchronisation
from fitkit.windows import Window

# Under which name the first bad batch is read together with an epoch's numbers; no log has a space in front.
_FIRST_BAD = " first bad batch"


@final
class TrainStep:
    """The training step: forward, loss, backward, and at the end of a window clipping and the optimizer's step.

    Args:
        compiled: what `Model.compile` made.
        user_step: an overridden training_step.
        class_weight: weight of each class.
        gradient_clip_val: norm to which the gradients are clipped; 0 is off.
        norm_order: p of the gradient norms to track; -1 is off.
        owns_batches: whether nobody writes into a batch's memory after its step.
        processes: that share each batch; None for a process that works alone.
    """

    def __init__(
        self,
        compiled: Compiled,
        user_step: UserStep | None = None,
        class_weight: ClassWeight | None = None,
        gradient_clip_val: float = 0.0,
        norm_order: float = -1,
        owns_batches: bool = False,
        processes: Processes | None = None,
    ) -> None:
        if compiled.optimizer is None and user_step is None:
            raise ValueError("Expected a module with trainable parameters, received one that has none to train.")
        self.numbers = Numbers.start(compiled, user_step, owns_batches=owns_batches)
        self.logs = BatchLogs(self.numbers)
        self.device = compiled.device
        compute = Computation(compiled, user_step, class_weight)
        self._compute = autocasting(compute, compiled.precision, compiled.device)
        self._compiled = compiled
        losses, world = None if user_step is not None else compiled.losses, None
        if processes is not None:
            self.numbers.is_shared, world = True, processes.world
        self._window = Window(losses, world)
        self.together: Synchronisation | Sharding | None = None
        if processes is not None and processes.is_sharded:
            self.together = Sharding(processes, compiled.module, self._window)
        elif processes is not None:
            self.together = Synchronisation(processes, compiled.module, self._window, compiled.device)
        self.processes = processes
        self._clip = gradient_clip_val
        self._norm_order = norm_order
        self._scaler = compiled.scaler
        self._may_train_by_hand = user_step is not None
        self._by_hand = False
        self._latest: Any = None
        self.latest_input: Any = None
        # Of the latest batch in the epoch; -1 before the first.
        self.index = -1
        self.begin_epoch(1, None)

    def begin_epoch(self, batches_per_step: int, length: int | None) -> None:
        """Empties the running numbers and sets how many batches make a step.

        Args:
            batches_per_step: K of the gradient accumulation.
            length: batches in the epoch; None when it is not known.
        """
        self._batches_per_step = batches_per_step
        self._length = length
        self.index = -1
        self._held = held_parameters(self._compiled)
        check_holds_trainable(self._compiled.optimizer, self._compiled.module, self._compiled.left_out)
        self._stepped = parameters_of(self._compiled.optimizer)
        if self._norm_order != -1:
            trained = trained_parameters(self._compiled)
            self.numbers.norms = GradientNorms(self._compiled.module, trained, self._norm_order)
        if self.together is not None:
            self.together.begin_epoch(self._held)
        self._window.discard()
        self.numbers.reset()

    def __call__(self, batch: Any, index: int, parts: int = 1, is_last: bool = True) -> None:
        """Trains on a batch, or on one of the parts that it comes in.

        Args:
            batch: the batch or part.
            index: of the batch in the epoch.
            parts: how many the batch is expected to have.
            is_last: whether it is the last of them.
        """
        # A window starts without gradients; the last one of an epoch may be short.
        together = self.together
        if self._window.is_complete:
            self._open_window(index, parts)

        # Forward and loss, in the user's precision.
        if together is None:
            outcome = self._compute(batch, index)
        else:
            outcome = together.run(self._compute, batch, index, is_last=is_last)

        # Backward.
        if has_gradient := self._has_gradient(outcome):
            if together is not None:
                together.backward(outcome, self._scaler, self._held)
            else:
                loss, seed = self._window.take(outcome.parts)
                if self._window.is_separate:
                    self._window.backward_each(outcome.parts, self._scaler, self._held)
                elif loss is not None:
                    scaled = loss if self._scaler is None else self._scaler.scale(loss)
                    scaled.backward(seed)

        # Numbers stay on the device; they are those before the step, which an output may share memory with.
        self.numbers.add(outcome, index, batch)
        self._latest = batch
        self.index = index

        # Where the window is complete, the optimizer's step.
        if has_gradient and is_last:
            self.end_batch()

    def skip(self, index: int) -> None:
        """Takes part in a batch of which this process has no sample."""
        if self._window.is_complete:
            self._open_window(index, 1)
        self.index = index
        self.end_batch()

    def stand_in(self, batch: Any, index: int) -> None:
        """Takes part in a batch, or its last part, of which this process has no sample, by one that does not count."""
        assert isinstance(self.together, Sharding)  # otherwise there is no such batch
        if self._window.is_complete:
            self._open_window(index, 1)
        self.together.pass_nothing(self.together.run(self._compute, batch, index, is_last=True))
        self._latest = batch
        self.index = index
        self.end_batch()

    def _open_window(self, index: int, parts: int) -> None:
        if not self._by_hand:
            self._clear_gradients()
        batches = self._batches_per_step
        # Data that gives more batches than it said goes on in whole windows.
        if self._length is not None and 0 < self._length - index < batches:
            batches = self._length - index
        self._window.open(batches, parts)
        if self.together is not None:
            self.together.open()

    def _has_gradient(self, outcome: Outcome) -> bool:
        """Whether there is something to go backward from; not after a step of the user's that trained by itself."""
        if outcome.parts[0].value.requires_grad and not self._by_hand:  # the usual case
            return True
        had_trained, self._by_hand = self._by_hand, False
        if any(part.value.requires_grad for part in outcome.parts):
            if had_trained:
                self._clear_gradients()
            return True
        if not self._may_train_by_hand:
            raise ValueError(
                "Expected a loss with a gradient, received one that depends on no trainable parameter. Is the output "
                "detached, computed under torch.no_grad(), or all of its way frozen?"
            )
        if self.together is not None:
            raise ValueError(
                "Expected a training_step that returns its loss with a gradient, which the processes bring together; "
                'received one that trains by itself. Use one process, or Model(strategy="single").'
            )
        self._by_hand = True
        self._window.discard()
        return False

    def _clear_gradients(self) -> None:
        for parameter in self._held:
            parameter.grad = None

    def explain_nonfinite(self) -> str:
        """Where NaN or infinity shows first, by one more forward pass on the latest batch."""
        batch = self._latest

        def forward() -> None:
            self._compute(batch, 0)

        if batch is None or isinstance(self.together, Sharding):  # a pass is for all processes, and this one's business
            return "It is not known where."
        if self._by_hand:
            return "The training_step trains by itself; look at what it returns."
        return explain_nonfinite(self._compiled.module, batch, forward, self.device)

    def end_batch(self) -> None:
        """Ends a batch: where it completes the window, the optimizer makes its step."""
        self._window.end_batch()
        if self.together is not None:
            self.together.end_batch()
        if self._window.is_complete:
            self._update()

    def keep(self) -> Callable[[], None]:
        """Notes everything that a batch part may change before the optimizer's step; the result puts it back."""
        module, window = self._compiled.module, self._window.state()
        random_state_before = random_state(self._compiled.device)
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        # At the start of a window gradients are about to be cleared anyway.
        held = [None if self._window.is_complete else parameter.grad for parameter in self._held]
        gradients = [None if gradient is None else gradient.clone() for gradient in held]

        def put_back() -> None:
            self._window.restore(window)
            restore_random_state(random_state_before, self._compiled.device)
            copy_back(buffers)
            for parameter, gradient in zip(self._held, gradients, strict=True):
                parameter.grad = gradient

        return put_back

    def finish(self) -> None:
        """Ends the epoch: a window that is still open makes its step."""
        if not self._window.is_complete:
            self._update()
        self._window.discard()
        if self.together is not None:  # running statistics are those of rank 0
            share_tensors(self._compiled.module.buffers())

    def release(self) -> None:
        """Leaves no gradient and no batch behind, only the shapes of the latest one."""
        self._window.discard()
        self.latest_input = self._describe_latest()
        self._latest = None
        self._clear_gradients()
        if self.together is not None:
            self.together.release()

    def _describe_latest(self) -> Any:
        """Shapes and types of what the module was called on; None where that is not known."""
        latest = self._latest.on_device if isinstance(self._latest, batches_of.Placed) else self._latest
        if latest is None or self._may_train_by_hand:
            return None
        try:
            return batches_of.described(batches_of.unpack(latest)[0])
        except (TypeError, RuntimeError):  # an object of another library, or a tensor without a plain shape
            return None

    def state_dict(self) -> dict[str, Any]:
        """What the next batch of the epoch depends on: the running numbers, and an open window with its gradients."""
        # Between two windows gradients are about to be cleared; those of a step of the user's own are the user's.
        kept = self._by_hand or not self._window.is_complete
        if kept and isinstance(self.together, Sharding):
            raise NotNowError(
                'strategy="fsdp" saves after batches that complete a step, received one in the midst of '
                "accumulate_grad_batches. Save at the end of an epoch, or every so many whole steps."
            )
        return {
            "index": self.index,
            "by_hand": self._by_hand,
            "window": self._window.state_dict(),
            "gradients": [parameter.grad for parameter in self._held] if kept else None,
            "numbers": self.numbers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was made; called after `begin_epoch`.

        Raises:
            ValueError: the state is of other numbers or parameters.
        """
        self.index, self._by_hand = state["index"], state["by_hand"]
        self._window.load_state_dict(state["window"], self.device)
        for parameter, gradient in zip(self._held, state["gradients"] or [None] * len(self._held), strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.numbers.load_state_dict(state["numbers"])

    def _update(self) -> None:
        """One optimizer step: unscale, norm, clip, step."""
        window, optimizer, scaler = self._window, self._compiled.optimizer, self._scaler
        if self.together is not None:
            self.together.close(self._held)
        if not window.holds_something:
            window.discard()
            return
        if optimizer is None:
            raise ValueError("Expected a module with something to train, received one without trainable parameters.")
        if self.together is None and not window.is_whole:
            window.close(self._held)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norms = None if self.numbers.norms is None else self.numbers.norms.measure()
        if self._clip:
            total = None if norms is None else self.numbers.norms.clip_total(norms)  # type: ignore[union-attr]
            clip_gradients(self._stepped, self._clip, total)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if norms is not None:
            # A step that the scaler skipped, because a gradient was not finite, is none.
            self.numbers.norms.add(norms, only_finite=scaler is not None)  # type: ignore[union-attr]
        window.discard()

    def epoch_logs(self) -> tuple[dict[str, float], int | None]:
        """The epoch's numbers, read at once, and the first batch whose loss was not finite (None: all were)."""
        values, first = self.numbers.values_and_first_bad()
        if self.numbers.norms is not None:
            values |= self.numbers.norms.means()
        numbers = read({**values, _FIRST_BAD: first})
        first_bad = numbers.pop(_FIRST_BAD)
        return numbers, None if first_bad < 0 else int(first_bad)


def held_parameters(compiled: Compiled) -> list[nn.Parameter]:
    """The parameters that the optimizer has, and those of the module that it has not."""
    held = [*parameters_of(compiled.optimizer), *compiled.module.parameters()]
    return list({id(parameter): parameter for parameter in held}.values())


def trained_parameters(compiled: Compiled) -> list[nn.Parameter]:
    """The parameters that the optimizer has and that are not frozen."""
    return [parameter for parameter in parameters_of(compiled.optimizer) if parameter.requires_grad]


@final
class TestStep:
    """The test step: forward, loss and metrics, without gradients.

    Args:
        compiled: what `Model.compile` made.
        user_step: an overridden validation_step.
        owns_batches: whether nobody writes into a batch's memory after its step.
        is_shared: whether several processes share each batch.
    """

    __test__ = False  # not a test for pytest

    def __init__(
        self,
        compiled: Compiled,
        user_step: UserStep | None = None,
        *,
        owns_batches: bool = False,
        is_shared: bool = False,
    ) -> None:
        may_join = user_step is None and JointLosses.serves(compiled)
        # What waits for joint losses is written over.
        self.numbers = Numbers.start(compiled, user_step, owns_batches=owns_batches and not may_join)
        self.numbers.is_shared = is_shared
        self._module = compiled.module
        compute = Computation(compiled, user_step)
        self._compute = autocasting(compute, compiled.precision, compiled.device)
        self._joint = JointLosses(compiled, self.numbers) if may_join else None
        self.logs = BatchLogs(self.numbers if self._joint is None else self._joint)

    def begin_epoch(self) -> None:
        """Empties the running numbers."""
        self.numbers.reset()
        if self._joint is not None:
            self._joint.begin_epoch()

    @property
    def failed_at(self) -> int | None:
        """The index of the batch in which an error came up, where that is not the latest."""
        return None if self._joint is None else self._joint.failed_at

    def __call__(self, batch: Any, index: int) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(batch, index)
        if self._joint is not None and self._joint.take(batch, index):
            return
        self.numbers.add(self._compute(batch, index), index, batch)

    def finish(self) -> None:
        """Ends the epoch: takes in what waits."""
        if self._joint is not None:
            with torch.no_grad():
                self._joint.settle()
        let_go(self._module)

    def epoch_logs(self) -> dict[str, float]:
        """The numbers of all batches, read at once."""
        return read(self.numbers.values_and_first_bad()[0])

    def skip(self, index: int) -> None:
        """A batch of which this process has no sample."""

    def stand_in(self, batch: Any, index: int) -> None:
        """A batch of which this process has no sample: the module sees one that does not count."""
        with torch.no_grad():
            self._compute(batch, index)


@final
class PredictStep:
    """The prediction step: forward alone; keeps the outputs on the CPU.

    Args:
        compiled: what `Model.compile` made, or a stand-in where nothing was compiled.
        user_step: an overridden predict_step.
    """

    def __init__(self, compiled: Compiled, user_step: UserStep | None = None) -> None:
        self.outputs: list[Any] = []
        self.logs: Mapping[str, Any] = {}
        self._compiled = compiled
        self._user_step = user_step
        self._compute = autocasting(self._outputs_of, compiled.precision, compiled.device)
        self._transfer = transfer_of(compiled)

    def __call__(self, batch: Any, index: int) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(batch, index)
        if self._transfer.is_needed:
            batch = self._transfer(batch).on_device
        output = self._compute(batch, index)
        self.logs = {"outputs": output}
        self.outputs.append(batches_of.on_cpu(output))

    def _outputs_of(self, batch: Any, index: int) -> Any:
        if self._user_step is not None:
            return self._user_step(batch, index)
        return batches_of.forward(self._compiled.forward, batches_of.unpack(batch)[0])

    def skip(self, index: int) -> None:
        """A batch of which this process has no sample."""
        self.logs = {}

    def stand_in(self, batch: Any, index: int) -> None:
        """A batch of which this process has no sample: the module sees one that does not count."""
        with torch.no_grad():
            self._compute(self._transfer(batch).on_device if self._transfer.is_needed else batch, index)
        self.logs = {}

    def finish(self) -> None:
        """Nothing is open at the end."""
        let_go(self._compiled.module)
