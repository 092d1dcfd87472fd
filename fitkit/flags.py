"""The arguments of fit that shape a training run, checked and resolved.

`FitArguments` is what came, `TrainingFlags` what the loop and the steps read. Each argument is checked here, before
the first batch, and nowhere else; what needs the data or the callbacks to be checked is checked where these are known.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Real
from typing import Any, TypeVar

from fitkit.errors import check_choice, check_flag, check_integer, check_number, nearest, show

Method = TypeVar("Method", bound=Callable[..., Any])


class _NobodyAsked(int):
    """A default that can be told from the same number passed by a user."""


MAX_NB_EPOCHS = _NobodyAsked(1000)


def refusing_unknown(method: Method) -> Method:
    """The method with a signature that does not show its last parameter, the keywords that it refuses."""
    signature = inspect.signature(method)
    shown = list(signature.parameters.values())[:-1]
    method.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return method


def refuse_unknown(method: Callable[..., Any], given: Iterable[str]) -> None:
    """Refuses keywords that a method has no parameter for, as Python does, and says what to do instead.

    Raises:
        TypeError: there is one.
    """
    for name in given:
        known = list(inspect.signature(method).parameters)[1:]
        instead = INSTEAD[method.__name__].get(name)
        advice = nearest(name, known) if instead is None else f" {instead}"
        raise TypeError(f"{method.__name__}() got an unexpected keyword argument {name!r}.{advice}")


@dataclass(frozen=True)
class FitArguments:
    """The arguments of one `Model.fit`, as they came; the names are its own, and what they mean stands there."""

    data: Any
    y: Any
    _: KW_ONLY
    batch_size: int | None
    epochs: int | None
    verbose: int | str
    callbacks: Any
    validation_split: float
    validation_data: Any
    shuffle: bool | None
    class_weight: Any
    sample_weight: Any
    initial_epoch: int
    steps_per_epoch: int | None
    validation_steps: int | None
    validation_batch_size: int | None
    validation_freq: Any
    min_nb_epochs: int
    max_nb_epochs: int
    early_stop_callback: Any
    enable_early_stop: bool
    accumulate_grad_batches: int | Mapping[int, int]
    gradient_clip_val: float
    track_grad_norm: float | str
    train_percent_check: float
    val_percent_check: float
    overfit_pct: float
    micro_batch_size: int | str | None
    on_nonfinite: str
    resume_from: Any
    dataloader_options: Mapping[str, Any] | None

    @classmethod
    def of(cls, fit: Callable[..., Any], data: Any, y: Any, others: Mapping[str, Any]) -> FitArguments:
        """The arguments of a call of fit, with its defaults.

        Raises:
            TypeError: others has an argument that fit has not.
        """
        defaults = {name: each.default for name, each in list(inspect.signature(fit).parameters.items())[3:]}
        refuse_unknown(fit, [name for name in others if name not in defaults])
        return cls(data, y, **{**defaults, **others})

    def flags(self) -> TrainingFlags:
        """The arguments that are flags, checked."""
        return TrainingFlags(**{each.name: getattr(self, each.name) for each in fields(TrainingFlags) if each.init})


_IN_COMPILE = (
    *("optimizer", "loss", "metrics", "learning_rate", "loss_weights", "weighted_metrics"),
    *("precision", "jit_compile", "channels_last"),
)
# What to do instead of arguments that are another method's here, or that Keras and Lightning have.
INSTEAD: dict[str, dict[str, str]] = {
    "compile": {
        **{name: f"Pass it to fit({name}=...)" for name in (each.name for each in fields(FitArguments))},
        "lr": "Write learning_rate=...",
        "run_eagerly": "Leave it out: without jit_compile=True nothing is compiled",
        "steps_per_execution": "Leave it out: a step costs no more than in a loop by hand",
        "auto_scale_loss": 'Write precision="16-mixed", which scales the loss',
    },
    "fit": {
        **{name: f"Pass it to compile({name}=...)" for name in _IN_COMPILE},
        "lr": "Pass it to compile(learning_rate=...)",
        **dict.fromkeys(
            ("workers", "num_workers", "use_multiprocessing", "max_queue_size"),
            'Give a DataLoader its workers; for a Dataset write dataloader_options={"num_workers": ...}',
        ),
        "max_epochs": "Write epochs=..., or max_nb_epochs=... with early stopping",
        "min_epochs": "Write min_nb_epochs=...",
        "nb_epoch": "Write epochs=...",
        "limit_train_batches": "Write train_percent_check=... for a fraction, steps_per_epoch=... for a count",
        "limit_val_batches": "Write val_percent_check=... for a fraction, validation_steps=... for a count",
        "overfit_batches": "Write overfit_pct=...",
        "check_val_every_n_epoch": "Write validation_freq=...",
        "val_dataloaders": "Write validation_data=...",
        "ckpt_path": "Write resume_from=...",
        **dict.fromkeys(("accelerator", "devices"), "Write Model(module, device=...)"),
        "strategy": "Write Model(module, strategy=...)",
    },
}


@dataclass(frozen=True)
class TrainingFlags:
    """Checked arguments of one fit; the names are those of `Model.fit`.

    Attributes:
        last_epoch: the epoch before which training ends at the latest (0-based, exclusive).
        default_stop: whether the default early stopping is asked for.
    """

    epochs: int | None = None
    initial_epoch: int = 0
    min_nb_epochs: int = 1
    max_nb_epochs: int = MAX_NB_EPOCHS
    enable_early_stop: bool = True
    accumulate_grad_batches: int | Mapping[int, int] = 1
    gradient_clip_val: float = 0.0
    track_grad_norm: float | str = -1
    train_percent_check: float = 1.0
    val_percent_check: float = 1.0
    overfit_pct: float = 0.0
    steps_per_epoch: int | None = None
    validation_steps: int | None = None
    validation_freq: int | tuple[int, ...] = 1
    micro_batch_size: int | str | None = None
    on_nonfinite: str = "raise"
    last_epoch: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._check_epochs()
        check_flag("enable_early_stop", self.enable_early_stop)
        for name in ("steps_per_epoch", "validation_steps"):
            if getattr(self, name) is not None:
                self._set(name, check_integer(name, getattr(self, name), least=1))
        for name in ("train_percent_check", "val_percent_check"):
            if check_number(name, getattr(self, name), least=0.0, most=1.0) == 0.0:
                raise ValueError(
                    f"Expected a fraction above 0 and up to 1, received {name}=0. Leave it out for all of it."
                )
        check_number("overfit_pct", self.overfit_pct, least=0.0, most=1.0)
        check_number("gradient_clip_val", self.gradient_clip_val, least=0.0)
        check_choice("on_nonfinite", self.on_nonfinite, ("raise", "stop", "ignore"))
        if self.micro_batch_size not in (None, "auto") or isinstance(self.micro_batch_size, bool):
            if isinstance(self.micro_batch_size, str):
                raise ValueError(
                    f'Expected a number of samples or "auto", received micro_batch_size={self.micro_batch_size!r}.'
                )
            check_integer("micro_batch_size", self.micro_batch_size, least=1)
        self._set("accumulate_grad_batches", _accumulation(self.accumulate_grad_batches))
        self._set("track_grad_norm", _norm_order(self.track_grad_norm))
        self._set("validation_freq", _frequency(self.validation_freq))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_epochs(self) -> None:
        self._set("initial_epoch", check_integer("initial_epoch", self.initial_epoch, least=0))
        self._set("min_nb_epochs", check_integer("min_nb_epochs", self.min_nb_epochs, least=1))
        if self.epochs is not None and not isinstance(self.max_nb_epochs, _NobodyAsked):
            raise ValueError(
                f"epochs={show(self.epochs)} and max_nb_epochs={show(self.max_nb_epochs)} exclude each other. epochs "
                "trains exactly that many; max_nb_epochs is the limit when early stopping decides."
            )
        if self.epochs is not None:
            last = check_integer("epochs", self.epochs, least=0)
            name = "epochs"
        else:
            last = check_integer("max_nb_epochs", self.max_nb_epochs, least=1)
            name = "max_nb_epochs"
        if self.min_nb_epochs > max(last, 1):
            raise ValueError(
                f"Expected min_nb_epochs to be at most {name}={last}, received min_nb_epochs={self.min_nb_epochs}."
            )
        self._set("last_epoch", last)

    @property
    def default_stop(self) -> bool:
        """Whether the run is to have the default early stopping: no epochs, and not switched off."""
        return self.epochs is None and self.enable_early_stop

    def window(self, epoch: int) -> int:
        """How many batches make one optimizer step in that 0-based epoch."""
        if not isinstance(self.accumulate_grad_batches, Mapping):
            return self.accumulate_grad_batches
        begun = [start for start in self.accumulate_grad_batches if start <= epoch]
        return self.accumulate_grad_batches[max(begun)] if begun else 1

    def validates(self, epoch: int) -> bool:
        """Whether the 0-based epoch ends with a validation."""
        if isinstance(self.validation_freq, int):
            return (epoch + 1) % self.validation_freq == 0
        return epoch + 1 in self.validation_freq


def _accumulation(value: Any) -> int | dict[int, int]:
    if not isinstance(value, Mapping):
        return check_integer("accumulate_grad_batches", value, least=1)
    if not value:
        raise ValueError("Expected {epoch: batches}, received accumulate_grad_batches={}, an empty dict.")
    return {
        check_integer("accumulate_grad_batches' epoch", epoch, least=0): check_integer(
            f"accumulate_grad_batches[{epoch!r}]", batches, least=1
        )
        for epoch, batches in value.items()
    }


def _norm_order(value: Any) -> float:
    """-1 when off, else the order p of the norm, math.inf for "inf"."""
    if value == "inf" or (isinstance(value, Real) and value == math.inf):
        return math.inf
    if isinstance(value, str):
        raise ValueError(f'Expected -1 (off), a number above 0 or "inf", received track_grad_norm={value!r}.')
    order = check_number("track_grad_norm", value)
    if order != -1 and order <= 0:
        raise ValueError(f'Expected -1 (off), a number above 0 or "inf", received track_grad_norm={value!r}.')
    return order


def _frequency(value: Any) -> int | tuple[int, ...]:
    """Every how many epochs, or in which 1-based epochs, there is a validation."""
    if isinstance(value, (Sequence, Set)) and not isinstance(value, str):
        if not value:
            raise ValueError(f"Expected the epochs to validate after, received validation_freq={show(value)}.")
        return tuple(check_integer("validation_freq's epoch", epoch, least=1) for epoch in value)
    return check_integer("validation_freq", value, least=1)
