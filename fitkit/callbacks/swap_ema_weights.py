"""An exponential moving average of the weights, with which a run validates and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.optimizer import StepListener, optimizer_of
from fitkit.errors import check_flag, check_number
from fitkit.optimization import parameters_of


@final
class SwapEMAWeights(Callback):
    """Averages the weights over the optimizer's steps, validates with the average and ends with it, as Keras does.

    After each optimizer step, ``average = momentum * average + (1 - momentum) * weights``, by
    ``torch.optim.swa_utils``; the average starts as the weights after the first step. In a validation, and in an
    evaluate or predict that is given this callback inside the fit, the module has the average. When the run ends,
    however it ends, the module keeps the average.

    What is averaged are the parameters that the optimizer has when the run begins. Buffers are not, as in Keras:
    a BatchNorm's running statistics remain those of the training weights. Where that matters, let
    ``torch.optim.swa_utils.update_bn(batches of inputs, module)`` measure them anew after the fit.

    A callback that keeps or saves weights in ``on_epoch_end`` gets the average with ``swap_on_epoch=True`` and after
    this one in the list. Those that do so for a number of the validation, ``EarlyStopping(restore_best_weights=True)``
    and ``ModelCheckpoint(save_best_only=True)``, are refused otherwise: they would keep weights never validated.

    Args:
        swap_on_epoch: whether the module has the average from this callback's ``on_epoch_end`` to the beginning of
            the next epoch.
        momentum: of the average, from 0 (none) to 1 (it stays as it was after the first step).

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: momentum is out of range.

    Example:
        >>> import torch, fitkit
        >>> model = fitkit.Model(torch.nn.Linear(1, 1, bias=False), device="cpu")
        >>> model.compile("sgd", "mse", learning_rate=0.1)
        >>> x, y = torch.ones(2, 1), torch.ones(2, 1)
        >>> history = model.fit(x, y, epochs=3, callbacks=[SwapEMAWeights(momentum=0.5)], verbose=0)
    """

    adds_to_logs = ()

    def __init__(self, swap_on_epoch: bool = False, *, momentum: float = 0.99) -> None:
        super().__init__()
        self.swap_on_epoch = check_flag("swap_on_epoch", swap_on_epoch)
        self.momentum = check_number("momentum", momentum, least=0.0, most=1.0)
        self._listener: StepListener | None = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        swapped = {"_kept": None, "_is_swapped": False, "_swapped_for_pass": False}
        return super().__getstate__() | {"_listener": None, "_average": None, "_parameters": [], **swapped}

    def _forget(self) -> None:
        # A list for each kind of tensor, of those that are updated in one go.
        self._parameters: list[list[Tensor]] = []
        # Outside the module: the average, or the weights while the module has the average. None before the first step.
        self._kept: list[list[Tensor]] | None = None
        self._is_swapped = False
        self._swapped_for_pass = False

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Forgets the fit before, and listens to the optimizer's steps."""
        optimizer = optimizer_of(self)
        if self._listener is not None:
            self._listener.remove()
        self._forget()
        self._parameters = _by_kind([parameter.detach() for parameter in parameters_of(optimizer)])
        self._average = get_ema_multi_avg_fn(self.momentum)
        self._listener = StepListener(optimizer, self._update)

    @torch.no_grad()
    def _update(self) -> None:
        if self._kept is None:
            self._kept = _copies(self._parameters)
            return
        for averages, parameters in zip(self._kept, self._parameters, strict=True):
            self._average(averages, parameters, 0)

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges the module's weights for those that are kept."""
        if self._kept is not None:
            weights = _copies(self._parameters)
            for parameters, kept in zip(self._parameters, self._kept, strict=True):
                torch._foreach_copy_(parameters, kept)
            self._kept = weights
            self._is_swapped = not self._is_swapped

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Gives the module the weights that are trained."""
        if self._is_swapped:
            self._swap()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Gives the module the average, when asked to."""
        if self.swap_on_epoch and not self._is_swapped:
            self._swap()

    def on_test_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Gives the module the average."""
        self._begin_pass()

    def on_test_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Gives the module back what it had."""
        self._end_pass()

    def on_predict_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Gives the module the average."""
        self._begin_pass()

    def on_predict_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Gives the module back what it had."""
        self._end_pass()

    def _begin_pass(self) -> None:
        if not self._is_swapped:
            self._swap()
            self._swapped_for_pass = self._is_swapped

    def _end_pass(self) -> None:
        if self._swapped_for_pass:
            self._swap()
            self._swapped_for_pass = False

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Leaves the module with the average, and nothing on the optimizer."""
        self._release()

    def on_exception(self, error: BaseException) -> None:
        """Leaves the module with the average after an error, too."""
        self._release()

    def _release(self) -> None:
        if self._listener is not None:
            self._listener.remove()
            self._listener = None
        if not self._is_swapped:
            self._swap()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The state in the middle of a fit: a copy of the weights outside the module, and whether and why swapped."""
        kept = None if self._kept is None else _copies(self._kept)
        return {"kept": kept, "is_swapped": self._is_swapped, "swapped_for_pass": self._swapped_for_pass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: it is of other parameters.
        """
        kept: list[list[Tensor]] | None = state["kept"]
        if kept is not None:
            if _shapes(kept) != _shapes(self._parameters):
                raise ValueError(
                    "Expected the averages of this optimizer's parameters, received those of others: "
                    f"{_shapes(kept)} for parameters of {_shapes(self._parameters)}. Resume with the module and the "
                    "optimizer of the saved run."
                )
            # Copies of the parameters are where these are, and of their dtype.
            copies = _copies(self._parameters)
            for copied, saved in zip(copies, kept, strict=True):
                torch._foreach_copy_(copied, saved)
            kept = copies
        self._kept = kept
        self._is_swapped = state["is_swapped"]
        # A pass that was left in its midst begins anew, and swaps by itself.
        self._swapped_for_pass = state["swapped_for_pass"]
        self._end_pass()


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in lists of one device and dtype each, in their order."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.values())


def _copies(groups: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in group] for group in groups]


def _shapes(groups: Sequence[Sequence[Tensor]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(tensor.shape) for tensor in group] for group in groups]
