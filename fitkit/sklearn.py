"""scikit-learn estimators around a torch module: `Classifier` and `Regressor`.

Import it by name, ``from fitkit.sklearn import Classifier``; it needs scikit-learn (``pip install 'fitkit[sklearn]'``).
Here arguments and arrays are brought into the form that `Model` takes; training is `Model.fit` as everywhere.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data
from torch import nn

from fitkit.callbacks import Callback, EarlyStopping
from fitkit.device import kept_modes, kept_random_state, move, resolve_device
from fitkit.errors import show
from fitkit.history import History
from fitkit.losses import Loss
from fitkit.model import Model
from fitkit.optimization import OptimizerArgument
from fitkit.summary import kept_buffers

Self = TypeVar("Self", bound="_Estimator")
MODULE_PREFIX = "module__"
# The parameters that are arguments of the same name of Model.compile, and of Model.fit whatever the run.
COMPILED = ("optimizer", "loss", "metrics", "learning_rate", "precision", "jit_compile", "channels_last")
FITTED = (
    *("batch_size", "validation_split", "shuffle", "enable_early_stop", "accumulate_grad_batches"),
    *("gradient_clip_val", "micro_batch_size", "on_nonfinite", "verbose"),
)


class MLP(nn.Sequential):
    """A multilayer perceptron: linear layers with ReLU between them.

    Args:
        n_features: numbers that come in.
        n_outputs: numbers that go out.
        hidden: the widths of the layers between.
    """

    def __init__(self, n_features: int, n_outputs: int, hidden: Sequence[int] = (100,)) -> None:
        widths = [n_features, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], n_outputs))


class _Estimator(BaseEstimator):
    """What `Classifier` and `Regressor` share: parameters (their constructors list them), training, pickling."""

    def _keep(self, given: Mapping[str, Any]) -> None:
        """Keeps a constructor's arguments as they came, as scikit-learn wants it: fit is where they are checked.

        Args:
            given: the constructor's ``locals()``.
        """
        of_module: Mapping[str, Any] = given["module__arguments"]
        for name, value in of_module.items():
            if not name.startswith(MODULE_PREFIX):
                raise TypeError(
                    f"{type(self).__name__} got {name}={show(value)}, but has no such argument. Arguments of the "
                    f"module are written {MODULE_PREFIX}{name}=..."
                )
        for name, value in {**given, **of_module}.items():
            if name not in ("self", "module__arguments"):
                setattr(self, name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name, those of the module as ``module__name``.

        Args:
            deep: whether to include the parameters of parameters that are estimators.
        """
        params: dict[str, Any] = super().get_params(deep=deep)
        return params | {name: value for name, value in vars(self).items() if name.startswith(MODULE_PREFIX)}

    def set_params(self: Self, **params: Any) -> Self:
        """Sets parameters, those of the module as ``module__name``.

        Args:
            params: parameters by name.
        """
        of_module = {name: value for name, value in params.items() if name.startswith(MODULE_PREFIX)}
        super().set_params(**{name: value for name, value in params.items() if name not in of_module})
        for name, value in of_module.items():
            setattr(self, name, value)
        return self

    @property
    def module_(self) -> nn.Module:
        """The trained module."""
        check_is_fitted(self)
        return self._model().module

    @property
    def history_(self) -> History:
        """The History of the latest training."""
        check_is_fitted(self)
        return self._model().history

    def _model(self) -> Model:
        model: Model = self.model_
        return model

    def _floats(self, precision: str) -> type[np.floating[Any]]:
        return np.float64 if precision == "64-true" else np.float32

    def _compile_arguments(self) -> dict[str, Any]:
        """What a Model is compiled with by the parameters of now; that of the fit may have been another."""
        return {name: getattr(self, name) for name in COMPILED}

    def _goes_on(self) -> bool:
        return bool(self.warm_start) and hasattr(self, "model_")

    def _train(self, x: Any, y: Any, sample_weight: Any, *, n_outputs: int, goes_on: bool, one_pass: bool) -> None:
        """Trains the module; a new one unless the training goes on.

        Args:
            x: validated inputs.
            y: targets as the loss takes them.
            sample_weight: ``(N,)``, or None.
            n_outputs: numbers that the module puts out for a sample.
            goes_on: whether the module that is there is trained further.
            one_pass: whether to train for one epoch only.
        """
        if not goes_on:
            self._random = None if self.random_state is None else check_random_state(self.random_state)
        with self._seeded():
            if not goes_on:
                self._compiled_with = self._compile_arguments()
                self.model_ = self._compiled(self._new_module(x.shape[1], n_outputs))
                self._check_width(x, n_outputs)
            # The parameters themselves stay as they are, so that a clone starts where this one did.
            self.callbacks_, early_stop_callback = copy.deepcopy((self.callbacks, self.early_stop_callback))
            limits: dict[str, Any] = {"epochs": 1}
            if not one_pass:
                limits = {"epochs": self.epochs, "min_nb_epochs": self.min_nb_epochs}
                # None stands for what fit takes by itself.
                limits |= {} if self.max_nb_epochs is None else {"max_nb_epochs": self.max_nb_epochs}
            self._model().fit(
                x,
                y,
                sample_weight=_normalized(sample_weight),
                early_stop_callback=early_stop_callback,
                callbacks=self.callbacks_,
                **{name: getattr(self, name) for name in FITTED},
                **limits,
            )

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """With random_state, draws from it alone and leaves every other generator as it was."""
        if self._random is None:
            yield
            return
        with kept_random_state(resolve_device(self.device)):
            torch.manual_seed(int(self._random.randint(np.iinfo(np.int32).max)))
            yield

    def _new_module(self, n_features: int, n_outputs: int) -> nn.Module:
        arguments = {
            name.removeprefix(MODULE_PREFIX): value
            for name, value in vars(self).items()
            if name.startswith(MODULE_PREFIX)
        }
        given = self.module
        if isinstance(given, nn.Module):
            if arguments:
                raise ValueError(
                    f"{', '.join(MODULE_PREFIX + name for name in arguments)} need a class or function that makes the "
                    f"module, received module={show(given)}, which is made already."
                )
            # The parameter itself stays untrained, so that a clone starts where this one did.
            return copy.deepcopy(given)
        if not callable(given):
            raise TypeError(
                "Expected a class or function that makes a module from (n_features, n_outputs), or a module, received "
                f"module={show(given)}."
            )
        try:
            inspect.signature(given).bind(n_features, n_outputs, **arguments)
        except TypeError as error:
            called = ", ".join(["n_features", "n_outputs", *(f"{name}=..." for name in arguments)])
            raise TypeError(
                f"module={show(given)} is called as module({called}) and does not take that: {error}. Wrap it: "
                "module=lambda n_features, n_outputs: ..."
            ) from error
        made = given(n_features, n_outputs, **arguments)
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"Expected module(n_features, n_outputs) to return a torch.nn.Module, received {show(made)}."
            )
        return made

    def _compiled(self, module: nn.Module) -> Model:
        model = Model(module, device=self.device)
        model.compile(**self._compiled_with)
        return model

    def _check_width(self, x: Any, n_outputs: int) -> None:
        """Refuses a module whose outputs cannot be those that are asked for."""

    def _outputs(self, X: Any) -> torch.Tensor:
        """The module's outputs in its own precision, which for mixed ones is float32."""
        check_is_fitted(self)
        x = validate_data(self, X, reset=False, dtype=self._floats(self._compiled_with["precision"]), allow_nd=True)
        outputs = self._model().predict(x, batch_size=self.batch_size, verbose=0)
        if not isinstance(outputs, torch.Tensor):
            raise TypeError(f"Expected a module with one tensor as its output, received {show(outputs)}.")
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickling: of the Model what cannot be made anew, with the module on the CPU."""
        state: dict[str, Any] = dict(super().__getstate__())
        model: Model | None = state.pop("model_", None)
        if model is not None:
            module = model.module if model.device.type == "cpu" else copy.deepcopy(model.module).cpu()
            optimizer = None if model.optimizer is None else model.optimizer.state_dict()
            state["_trained"] = (module, optimizer, model.history.state_dict())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes the Model anew around the pickled module."""
        state = dict(state)
        trained = state.pop("_trained", None)
        super().__setstate__(state)
        if trained is not None:
            module, optimizer, history = trained
            self.model_ = self._compiled(module)
            if optimizer is not None and self.model_.optimizer is not None:
                self.model_.optimizer.load_state_dict(optimizer)
            self.model_.history.load_state_dict(history)


class Classifier(ClassifierMixin, _Estimator):
    """A scikit-learn classifier that trains a torch module.

    The module is given X as floats, ``(N, n_features)`` or with further dimensions, and puts out one number a class,
    ``(N, classes)``; also for two classes.

    Args:
        module: a class or function, called as ``module(n_features, n_outputs, **arguments)``, where n_features is
            ``X.shape[1]``, n_outputs the number of classes and arguments those given as ``module__name=...``; or a
            module, of which a copy is trained.
        loss: a loss over classes: its name ("cross_entropy", "nll"), a loss module, or a callable
            ``loss(logits, class_indices)``.
        optimizer: as in `Model.compile`, but no optimizer object, which would belong to one module.
        learning_rate: as in `Model.compile`.
        metrics: as in `Model.compile`.
        precision: as in `Model.compile`.
        jit_compile: as in `Model.compile`.
        channels_last: as in `Model.compile`.
        device: as in `Model`.
        batch_size: as in `Model.fit`; for predictions too.
        epochs: as in `Model.fit`; None trains until early stopping, at most max_nb_epochs.
        validation_split: as in `Model.fit`: the last part of the data, which should be in random order then.
        shuffle: as in `Model.fit`.
        min_nb_epochs: as in `Model.fit`.
        max_nb_epochs: as in `Model.fit`, where epochs is None; None is 1000.
        early_stop_callback: as in `Model.fit`.
        enable_early_stop: as in `Model.fit`.
        accumulate_grad_batches: as in `Model.fit`.
        gradient_clip_val: as in `Model.fit`.
        micro_batch_size: as in `Model.fit`.
        on_nonfinite: as in `Model.fit`.
        callbacks: as in `Model.fit`.
        class_weight: {label: weight}, or "balanced" for weights that give each class the same sum.
        warm_start: whether fit goes on with the module that an earlier fit has trained.
        random_state: an int or RandomState fixes the module's initial weights and the order of batches and leaves
            torch's own generators alone; None draws from them.
        verbose: as in `Model.fit`.
        module__arguments: ``module__name=...`` is given to the module as ``name=...``.

    Attributes:
        classes_: the labels, in the order of the module's outputs.
        n_features_in_: ``X.shape[1]`` in fit.
        callbacks_: the copies of callbacks that the latest training was given.
        model_: the `Model`.
        module_: the trained module.
        history_: the `History` of the latest training.

    Example:
        >>> classifier = Classifier(module__hidden=(16,), epochs=200, random_state=0)
        >>> x = np.linspace(-1, 1, 50)[:, None]
        >>> classifier.fit(x, np.where(x[:, 0] > 0, "right", "left")).predict([[-0.8], [0.9]]).tolist()
        ['left', 'right']
    """

    def __init__(
        self,
        module: Any = MLP,
        *,
        loss: Any = "cross_entropy",
        optimizer: OptimizerArgument = "adam",
        learning_rate: float | None = None,
        metrics: Any = None,
        precision: str = "32-true",
        jit_compile: bool = False,
        channels_last: bool = False,
        device: str | torch.device = "auto",
        batch_size: int | None = None,
        epochs: int | None = 100,
        validation_split: float = 0.0,
        shuffle: bool | None = None,
        min_nb_epochs: int = 1,
        max_nb_epochs: int | None = None,
        early_stop_callback: EarlyStopping | None = None,
        enable_early_stop: bool = True,
        accumulate_grad_batches: int | Mapping[int, int] = 1,
        gradient_clip_val: float = 0,
        micro_batch_size: int | str | None = None,
        on_nonfinite: str = "raise",
        callbacks: Sequence[Callback] | Callback | None = None,
        class_weight: Mapping[Any, float] | str | None = None,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int | str = 0,
        **module__arguments: Any,
    ) -> None:
        self._keep(locals())

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Classifier:
        """Trains a new module, or with warm_start the one that is there.

        Args:
            X: array of numbers, ``(N, n_features)`` or with further dimensions; integers become floats.
            y: labels of any kind, ``(N,)``.
            sample_weight: ``(N,)``; only their proportions matter.

        Returns:
            The classifier.

        Raises:
            ValueError: arrays or arguments that do not fit.
            TypeError: a module that cannot be made.
        """
        return self._fit(X, y, sample_weight, goes_on=self._goes_on(), one_pass=False)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Classifier:
        """Trains for one epoch, going on where the last training was.

        Args:
            X: as in `fit`.
            y: as in `fit`.
            classes: all labels that will ever come; needed in the first call.
            sample_weight: as in `fit`.

        Returns:
            The classifier.

        Raises:
            ValueError: no classes in the first call, or others later; labels outside them.
        """
        if classes is None and not hasattr(self, "model_"):
            raise ValueError("Expected all labels in the first call of partial_fit, received classes=None.")
        goes_on = hasattr(self, "model_")
        if goes_on and classes is not None and not np.array_equal(self.classes_, unique_labels(classes)):
            raise ValueError(f"Expected the classes of the first call, {self.classes_}, received {classes=}.")
        return self._fit(X, y, sample_weight, goes_on=goes_on, one_pass=True, classes=classes)

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, *, goes_on: bool, one_pass: bool, classes: Any = None
    ) -> Classifier:
        self._check_loss()
        labels = column_or_1d(y, warn=True)
        floats = self._floats(self._compiled_with["precision"] if goes_on else self.precision)
        x, labels = validate_data(self, X, labels, reset=not goes_on, dtype=floats, allow_nd=True)
        check_classification_targets(labels)
        if not goes_on:
            self.classes_ = unique_labels(labels if classes is None else classes)
        indices = LabelEncoder().fit(self.classes_).transform(labels)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, x)
        if self.class_weight is not None:
            of_classes = compute_sample_weight(self.class_weight, labels)
            weights = of_classes if weights is None else weights * of_classes
        self._train(
            x, indices.astype(np.int64), weights, n_outputs=len(self.classes_), goes_on=goes_on, one_pass=one_pass
        )
        return self

    def predict(self, X: Any) -> Any:
        """The most probable label of each sample, ``(N,)``.

        Args:
            X: as in `fit`.
        """
        outputs = self._outputs(X)
        return self.classes_[outputs.argmax(1).numpy()]

    def predict_proba(self, X: Any) -> Any:
        """The probabilities of all classes, ``(N, classes)``, in the order of ``classes_``.

        Args:
            X: as in `fit`.
        """
        outputs = self._outputs(X)
        logarithms = Loss(self._compiled_with["loss"], "loss").meaning.scale == "log_probabilities"
        # The exponentials of logarithms that were computed in bfloat16 do not quite have a sum of 1.
        probabilities = outputs.exp() if logarithms else outputs.softmax(1)
        return (probabilities / probabilities.sum(1, keepdim=True)).numpy()

    def _check_width(self, x: Any, n_outputs: int) -> None:
        model = self._model()
        module = model.module
        with kept_buffers(module), kept_modes(module), kept_random_state(model.device), torch.no_grad():
            output = module.eval()(move(torch.as_tensor(x[:2]), model.device))
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else None
        if shape is not None and shape != (len(x[:2]), n_outputs):
            raise ValueError(
                f"Expected a module that puts out one number a class, (N, {n_outputs}) for the classes "
                f"{show(self.classes_.tolist())}, received module={show(self.module)} with an output of shape "
                f"(N, {', '.join(map(str, shape[1:]))}). Make its last layer that wide, by the n_outputs that a class "
                "or function is called with."
            )

    def _check_loss(self) -> None:
        """A callable of the user's says nothing of itself and is taken to be over logits."""
        if self.loss is None or isinstance(self.loss, (list, tuple, dict)):
            raise ValueError(f"Expected one loss over classes, received loss={show(self.loss)}.")
        meaning = Loss(self.loss, "loss").meaning
        if not (meaning.classes or meaning.scale == "unknown"):
            raise ValueError(
                'Expected a loss over classes, such as "cross_entropy" or "nll", received '
                f"loss={show(self.loss)}. For numbers use Regressor."
            )


class Regressor(RegressorMixin, _Estimator):
    """A scikit-learn regressor that trains a torch module.

    The module is given X as floats, ``(N, n_features)`` or with further dimensions, and puts out ``(N, n_outputs)``.

    Args:
        module: as in `Classifier`; n_outputs is the number of columns of y, 1 for a vector.
        loss: a loss over values: its name ("mse", "mae", "huber"), a loss module, or a callable
            ``loss(output, target)``.
        optimizer: as in `Classifier`.
        learning_rate: as in `Model.compile`.
        metrics: as in `Model.compile`.
        precision: as in `Model.compile`.
        jit_compile: as in `Model.compile`.
        channels_last: as in `Model.compile`.
        device: as in `Model`.
        batch_size: as in `Classifier`.
        epochs: as in `Classifier`.
        validation_split: as in `Classifier`.
        shuffle: as in `Model.fit`.
        min_nb_epochs: as in `Model.fit`.
        max_nb_epochs: as in `Classifier`.
        early_stop_callback: as in `Model.fit`.
        enable_early_stop: as in `Model.fit`.
        accumulate_grad_batches: as in `Model.fit`.
        gradient_clip_val: as in `Model.fit`.
        micro_batch_size: as in `Model.fit`.
        on_nonfinite: as in `Model.fit`.
        callbacks: as in `Model.fit`.
        warm_start: as in `Classifier`.
        random_state: as in `Classifier`.
        verbose: as in `Model.fit`.
        module__arguments: as in `Classifier`.

    Attributes:
        n_features_in_: ``X.shape[1]`` in fit.
        callbacks_: the copies of callbacks that the latest training was given.
        model_: the `Model`.
        module_: the trained module.
        history_: the `History` of the latest training.

    Example:
        >>> x = np.linspace(-1, 1, 50)[:, None]
        >>> regressor = Regressor(learning_rate=0.01, random_state=0).fit(x, np.abs(x[:, 0]))
        >>> regressor.score(x, np.abs(x[:, 0])) > 0.99
        True
    """

    def __init__(
        self,
        module: Any = MLP,
        *,
        loss: Any = "mse",
        optimizer: OptimizerArgument = "adam",
        learning_rate: float | None = None,
        metrics: Any = None,
        precision: str = "32-true",
        jit_compile: bool = False,
        channels_last: bool = False,
        device: str | torch.device = "auto",
        batch_size: int | None = None,
        epochs: int | None = 100,
        validation_split: float = 0.0,
        shuffle: bool | None = None,
        min_nb_epochs: int = 1,
        max_nb_epochs: int | None = None,
        early_stop_callback: EarlyStopping | None = None,
        enable_early_stop: bool = True,
        accumulate_grad_batches: int | Mapping[int, int] = 1,
        gradient_clip_val: float = 0,
        micro_batch_size: int | str | None = None,
        on_nonfinite: str = "raise",
        callbacks: Sequence[Callback] | Callback | None = None,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int | str = 0,
        **module__arguments: Any,
    ) -> None:
        self._keep(locals())

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Regressor:
        """Trains a new module, or with warm_start the one that is there.

        Args:
            X: array of numbers, ``(N, n_features)`` or with further dimensions; integers become floats.
            y: numbers, ``(N,)`` or ``(N, n_outputs)``.
            sample_weight: ``(N,)``; only their proportions matter.

        Returns:
            The regressor.

        Raises:
            ValueError: arrays or arguments that do not fit.
            TypeError: a module that cannot be made.
        """
        return self._fit(X, y, sample_weight, goes_on=self._goes_on(), one_pass=False)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Regressor:
        """Trains for one epoch, going on where the last training was.

        Args:
            X: as in `fit`.
            y: as in `fit`.
            sample_weight: as in `fit`.

        Returns:
            The regressor.
        """
        return self._fit(X, y, sample_weight, goes_on=hasattr(self, "model_"), one_pass=True)

    def _fit(self, X: Any, y: Any, sample_weight: Any, *, goes_on: bool, one_pass: bool) -> Regressor:
        floats = self._floats(self._compiled_with["precision"] if goes_on else self.precision)
        x, y = validate_data(
            self, X, y, reset=not goes_on, dtype=floats, allow_nd=True, multi_output=True, y_numeric=True
        )
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, x)
        self._is_vector = y.ndim == 1
        outputs = 1 if self._is_vector else y.shape[1]
        self._train(x, y.astype(floats), weights, n_outputs=outputs, goes_on=goes_on, one_pass=one_pass)
        return self

    def predict(self, X: Any) -> Any:
        """The module's numbers for each sample: ``(N,)`` where fit was given a vector, else ``(N, n_outputs)``.

        Args:
            X: as in `fit`.
        """
        outputs = self._outputs(X)
        return (outputs.flatten() if self._is_vector else outputs).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _normalized(sample_weight: Any) -> Any:
    """Weights with a mean of 1, so that they change what samples count among each other and not the step's length."""
    if sample_weight is None:
        return None
    mean = float(np.mean(sample_weight))
    if not mean > 0:
        raise ValueError(f"Expected weights with a sum above 0, received sample_weight={show(sample_weight)}.")
    return sample_weight / mean
