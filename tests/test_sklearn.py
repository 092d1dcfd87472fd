"""The scikit-learn estimators: scikit-learn's own checks, and what its tools do with them."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_blobs, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, LambdaCallback, SwapEMAWeights, Timer
from fitkit.sklearn import MLP, Classifier, Regressor

BLOBS, NUMBERS = make_blobs(120, 4, centers=3, random_state=0)
LABELS = np.array(["ape", "bee", "cat"])[NUMBERS]
ROWS, VALUES = make_regression(120, 4, n_targets=2, noise=1.0, random_state=0)
VALUES = VALUES / VALUES.std()

# What scikit-learn's checks ask of the estimators' arithmetic and float32 cannot give; docs/scikit_learn.md lists them.
ROUNDING = "equal up to the rounding of float32, where the check allows 1e-7"
FLOAT32 = "predictions have the module's precision, where the check asks for float64"
EXEMPT = {
    Classifier: {"check_sample_weight_equivalence_on_dense_data": ROUNDING},
    Regressor: {"check_sample_weight_equivalence_on_dense_data": ROUNDING, "check_regressor_multioutput": FLOAT32},
}


class Net(nn.Module):
    def __init__(self, n_features: int, n_outputs: int, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_features, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, n_outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output


def classifier(**options: Any) -> Classifier:
    return Classifier(**({"learning_rate": 0.01, "epochs": 20, "random_state": 0, "device": "cpu"} | options))


def regressor(**options: Any) -> Regressor:
    return Regressor(**({"learning_rate": 0.01, "epochs": 30, "random_state": 0, "device": "cpu"} | options))


def weights_of(estimator: Any) -> Tensor:
    return nn.utils.parameters_to_vector(estimator.module_.parameters()).detach()


# ---------------------------------------------------------------------------------------------------------------------
# scikit-learn's own checks.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", [Classifier, Regressor])
def test_check_estimator_passes_but_for_the_exempt_checks(kind: Any) -> None:
    results = check_estimator(kind(device="cpu"), expected_failed_checks=EXEMPT[kind], on_skip=None)
    failed = {result["check_name"] for result in results if result["status"] == "xfail"}
    # An exemption that nothing needs any more is to go.
    assert failed <= set(EXEMPT[kind])


@pytest.mark.long
@pytest.mark.parametrize("kind", [Classifier, Regressor])
def test_check_estimator_passes_without_exemption_in_float64(kind: Any) -> None:
    results = check_estimator(kind(device="cpu", precision="64-true"), on_skip=None)
    not_passed = {result["check_name"] for result in results if result["status"] != "passed"}
    assert not_passed <= {"check_array_api_input"}  # skipped unless scipy is told to take arrays of other libraries


def test_importing_fitkit_imports_no_scikit_learn() -> None:
    script = "import sys, fitkit; assert not {'sklearn', 'fitkit.sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# ---------------------------------------------------------------------------------------------------------------------
# scikit-learn's tools.
# ---------------------------------------------------------------------------------------------------------------------


def test_a_pipeline_a_grid_search_and_cross_validation_work_together() -> None:
    pipeline = make_pipeline(StandardScaler(), classifier(module=Net))
    grid = {"classifier__module__width": [4, 8], "classifier__optimizer": ["sgd", "adam"]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(BLOBS, LABELS)
    assert set(search.best_params_) == set(grid)
    assert search.best_score_ > 0.9
    assert search.best_estimator_[-1].module_.layers[0].out_features == search.best_params_["classifier__module__width"]
    assert cross_val_score(pipeline, BLOBS, LABELS, cv=3).mean() > 0.9


@pytest.mark.long
def test_a_grid_search_in_processes_gives_the_scores_of_one_process() -> None:
    scores = [
        GridSearchCV(classifier(epochs=3), {"module__hidden": [(4,), (8,)]}, cv=2, n_jobs=jobs)
        .fit(BLOBS, LABELS)
        .cv_results_["mean_test_score"]
        .tolist()
        for jobs in (None, 2)
    ]
    assert scores[0] == scores[1]


def test_probabilities_can_be_calibrated() -> None:
    calibrated = CalibratedClassifierCV(classifier(), cv=3).fit(BLOBS, LABELS)
    assert calibrated.score(BLOBS, LABELS) > 0.9


def test_a_clone_has_the_parameters_those_of_the_module_too_and_no_training() -> None:
    original = classifier(module=Net, module__width=5, class_weight="balanced").fit(BLOBS, LABELS)
    copied = clone(original)
    assert copied.get_params() == original.get_params()
    assert copied.get_params()["module__width"] == 5
    with pytest.raises(NotFittedError, match="not fitted yet"):
        copied.predict(BLOBS)


def test_the_representation_shows_what_differs_from_the_defaults() -> None:
    assert repr(Classifier(epochs=3, module__hidden=(4,))) == "Classifier(epochs=3, module__hidden=(4,))"
    assert "module__hidden" in Classifier(module__hidden=(4,))._repr_html_()


def test_a_pickle_predicts_and_trains_on_as_the_original() -> None:
    original = classifier(metrics=["accuracy", "f1"], optimizer="adam").fit(BLOBS, LABELS)
    copied = pickle.loads(pickle.dumps(original))
    np.testing.assert_array_equal(copied.predict_proba(BLOBS), original.predict_proba(BLOBS))
    assert copied.history_.history == original.history_.history
    for each in (original, copied):
        each.partial_fit(BLOBS, LABELS)
    assert torch.equal(weights_of(copied), weights_of(original))


class Counting(Callback):
    """Counts the epochs of a run."""

    epochs = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs += 1


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [EarlyStopping("loss"), Counting()]},
        {"callbacks": Timer(100)},
        {"callbacks": [SwapEMAWeights()]},
        {"early_stop_callback": EarlyStopping("loss", restore_best_weights=True)},
    ],
)
def test_a_fitted_estimator_with_callbacks_pickles(options: Any) -> None:
    original = classifier(epochs=2, **options).fit(BLOBS, LABELS)
    copied = pickle.loads(pickle.dumps(original))
    np.testing.assert_array_equal(copied.predict_proba(BLOBS), original.predict_proba(BLOBS))


def test_training_is_given_copies_of_the_callbacks() -> None:
    stopping = EarlyStopping("loss", patience=50)
    given = classifier(epochs=3, callbacks=[Counting(), stopping], early_stop_callback=stopping).fit(BLOBS, LABELS)
    assert [callback.epochs for callback in (given.callbacks[0], given.callbacks_[0])] == [0, 3]
    assert (stopping.best, given.callbacks_[1].best_epoch) == (None, 2)
    assert not hasattr(clone(given).callbacks[0], "model")


@pytest.mark.parametrize(
    "later",
    [{"precision": "64-true"}, {"optimizer": "sgd"}, {"loss": "nll"}, {"learning_rate": 9.0}, {"metrics": ["f1"]}],
    ids=str,
)
def test_a_pickle_is_of_what_was_fitted_whatever_is_set_later(later: dict[str, Any]) -> None:
    original = classifier(epochs=2, optimizer="adam").fit(BLOBS, LABELS)
    probabilities = original.predict_proba(BLOBS)
    original.set_params(**later)
    copied = pickle.loads(pickle.dumps(original))
    for each in (original, copied):
        np.testing.assert_array_equal(each.predict_proba(BLOBS), probabilities)
        each.partial_fit(BLOBS, LABELS)
    assert torch.equal(weights_of(copied), weights_of(original))
    assert type(copied.model_.optimizer) is torch.optim.Adam


def test_an_untrained_estimator_pickles() -> None:
    assert pickle.loads(pickle.dumps(Regressor(epochs=3))).epochs == 3


# ---------------------------------------------------------------------------------------------------------------------
# Labels, probabilities, weights.
# ---------------------------------------------------------------------------------------------------------------------


def test_labels_are_strings_and_probabilities_follow_classes() -> None:
    fitted = classifier().fit(BLOBS, LABELS)
    probabilities = fitted.predict_proba(BLOBS)
    assert fitted.classes_.tolist() == ["ape", "bee", "cat"]
    assert probabilities.shape == (120, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-5)
    assert (fitted.classes_[probabilities.argmax(1)] == fitted.predict(BLOBS)).all()
    assert fitted.score(BLOBS, LABELS) > 0.9


def test_probabilities_of_nll_are_those_that_the_module_gives() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1))
    fitted = classifier(module=module, loss="nll").fit(BLOBS, LABELS)
    expected = fitted.module_(torch.tensor(BLOBS, dtype=torch.float32)).exp().detach()
    np.testing.assert_allclose(fitted.predict_proba(BLOBS), expected.numpy(), rtol=1e-5)


def test_probabilities_have_a_sum_of_one_in_mixed_precision_too() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1))
    fitted = classifier(module=module, loss="nll", precision="bf16-mixed", epochs=2).fit(BLOBS, LABELS)
    np.testing.assert_allclose(fitted.predict_proba(BLOBS).sum(1), 1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_weights_count_as_repeated_samples_whatever_their_sum(kind: str) -> None:
    x, y = BLOBS[:12], LABELS[:12] if kind == "classifier" else VALUES[:12, 0]
    make = classifier if kind == "classifier" else regressor
    options = {"precision": "64-true", "batch_size": 100, "optimizer": "sgd", "shuffle": False}
    weights = np.arange(12) % 3
    weighted = make(**options).fit(x, y, sample_weight=5.0 * weights)
    rows = np.repeat(np.arange(12), weights)
    repeated = make(**options).fit(x[rows], y[rows])
    torch.testing.assert_close(weights_of(weighted), weights_of(repeated), rtol=1e-10, atol=1e-12)


def test_balanced_classes_are_weighted_as_scikit_learn_says() -> None:
    rows = np.r_[np.flatnonzero(NUMBERS == 0)[:4], np.flatnonzero(NUMBERS == 1)]
    weights = np.where(NUMBERS[rows] == 0, len(rows) / 8, len(rows) / (2 * (len(rows) - 4)))
    balanced = classifier(class_weight="balanced").fit(BLOBS[rows], LABELS[rows])
    by_hand = classifier().fit(BLOBS[rows], LABELS[rows], sample_weight=weights)
    torch.testing.assert_close(weights_of(balanced), weights_of(by_hand))
    named = classifier(class_weight={"ape": weights[0], "bee": weights[-1]}).fit(BLOBS[rows], LABELS[rows])
    torch.testing.assert_close(weights_of(named), weights_of(by_hand))


@pytest.mark.parametrize("weight", [0.0, -1.0])  # of zeros, a newer scikit-learn says so itself
def test_weights_without_any_sum_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"non-zero|sum above 0"):
        regressor().fit(ROWS, VALUES, sample_weight=np.full(120, weight))


# ---------------------------------------------------------------------------------------------------------------------
# Regression, feature names, images.
# ---------------------------------------------------------------------------------------------------------------------


def test_several_outputs_are_predicted_together_and_a_vector_stays_a_vector() -> None:
    both = regressor().fit(ROWS, VALUES)
    assert both.predict(ROWS).shape == (120, 2)
    assert both.score(ROWS, VALUES) > 0.9
    one = regressor().fit(ROWS, VALUES[:, 0])
    assert one.predict(ROWS).shape == (120,)
    assert one.score(ROWS, VALUES[:, 0]) > 0.9


def test_feature_names_are_kept_and_others_refused() -> None:
    frame = pd.DataFrame(BLOBS, columns=list("abcd"))
    fitted = classifier(epochs=1).fit(frame, LABELS)
    assert (fitted.n_features_in_, fitted.feature_names_in_.tolist()) == (4, list("abcd"))
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(frame[list("dcba")])


def test_images_have_their_channels_as_features() -> None:
    def make(n_features: int, n_outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(n_features, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_outputs)
        )

    images = np.random.default_rng(0).normal(size=(20, 3, 8, 8))
    fitted = classifier(module=make, epochs=2, channels_last=True).fit(images, np.arange(20) % 2)
    assert fitted.n_features_in_ == 3
    assert fitted.predict_proba(images).shape == (20, 2)


def test_mixed_precision_predicts_in_float32() -> None:
    fitted = regressor(precision="bf16-mixed", epochs=1).fit(ROWS, VALUES)
    assert fitted.predict(ROWS).dtype == np.float32


# ---------------------------------------------------------------------------------------------------------------------
# Random states, warm starts.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [int, np.random.RandomState])
def test_a_random_state_fixes_the_weights_and_leaves_torchs_generator_alone(kind: Any) -> None:
    before = torch.get_rng_state()
    first = classifier(module=Net, module__dropout=0.5, random_state=kind(3)).fit(BLOBS, LABELS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second = classifier(module=Net, module__dropout=0.5, random_state=kind(3)).fit(BLOBS, LABELS)
    other = classifier(module=Net, module__dropout=0.5, random_state=kind(4)).fit(BLOBS, LABELS)
    assert torch.equal(weights_of(first), weights_of(second))
    assert not torch.equal(weights_of(first), weights_of(other))


def test_without_a_random_state_torchs_seed_decides() -> None:
    fitted = []
    for _ in range(2):
        torch.manual_seed(5)
        fitted.append(weights_of(classifier(random_state=None, epochs=2).fit(BLOBS, LABELS)))
    assert torch.equal(*fitted)
    assert not torch.equal(fitted[0], weights_of(classifier(random_state=None, epochs=2).fit(BLOBS, LABELS)))


def test_a_fit_starts_anew_and_a_warm_start_goes_on() -> None:
    anew = classifier(epochs=2).fit(BLOBS, LABELS)
    once = weights_of(anew)
    assert torch.equal(weights_of(anew.fit(BLOBS, LABELS)), once)
    warm = classifier(epochs=2, warm_start=True).fit(BLOBS, LABELS)
    module = warm.module_
    assert warm.fit(BLOBS, LABELS).module_ is module
    assert not torch.equal(weights_of(warm), once)


def test_partial_fits_are_the_epochs_of_one_fit() -> None:
    options: dict[str, Any] = {"shuffle": False, "module": nn.Linear(4, 3)}
    parts = classifier(**options)
    for _ in range(3):
        parts.partial_fit(BLOBS, LABELS, classes=["cat", "ape", "bee"])
    whole = classifier(epochs=3, **options).fit(BLOBS, LABELS)
    assert torch.equal(weights_of(parts), weights_of(whole))
    assert len(parts.history_) == 1


def test_partial_fit_needs_all_classes_first_and_the_same_later() -> None:
    with pytest.raises(ValueError, match="all labels in the first call of partial_fit"):
        classifier().partial_fit(BLOBS, LABELS)
    started = classifier().partial_fit(BLOBS, LABELS, classes=["ape", "bee", "cat"])
    with pytest.raises(ValueError, match="Expected the classes of the first call"):
        started.partial_fit(BLOBS, LABELS, classes=["ape", "bee"])
    with pytest.raises(ValueError, match="previously unseen labels"):
        started.partial_fit(BLOBS, np.full(120, "dog"))


# ---------------------------------------------------------------------------------------------------------------------
# The module, arguments of compile and fit, errors.
# ---------------------------------------------------------------------------------------------------------------------


def test_the_default_module_has_the_layers_that_hidden_says() -> None:
    widths = [(layer.in_features, layer.out_features) for layer in MLP(3, 2, (5, 7)) if isinstance(layer, nn.Linear)]
    assert widths == [(3, 5), (5, 7), (7, 2)]
    assert len(MLP(3, 2, ())) == 1


def test_a_module_that_is_made_already_is_trained_as_a_copy() -> None:
    module = nn.Linear(4, 3)
    before = module.weight.detach().clone()
    fitted = classifier(module=module).fit(BLOBS, LABELS)
    assert torch.equal(module.weight, before)
    assert not torch.equal(fitted.module_.weight, before)


def test_early_stopping_callbacks_and_history_are_those_of_fit() -> None:
    seen: list[int] = []
    fitted = classifier(
        epochs=None,
        max_nb_epochs=50,
        validation_split=0.25,
        early_stop_callback=EarlyStopping("val_loss", patience=2),
        callbacks=[LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))],
        metrics=["accuracy"],
        learning_rate=0.1,
    ).fit(BLOBS, LABELS)
    assert list(fitted.history_) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert fitted.history_.stop_reason == "early_stopping"
    assert seen == fitted.history_.epoch


def test_an_optimizer_can_be_any_callable() -> None:
    make = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    fitted = classifier(optimizer=make, learning_rate=None).fit(BLOBS, LABELS)
    assert isinstance(fitted.model_.optimizer, torch.optim.SGD)
    assert fitted.score(BLOBS, LABELS) > 0.9


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (Classifier(loss="mse"), r"Expected a loss over classes.*received loss='mse'. For numbers use Regressor"),
        (Classifier(loss=None), r"Expected one loss over classes, received loss=None"),
        (Classifier(loss="cross_entrpy"), r"Did you mean 'cross_entropy'"),
        (Classifier(optimizer="adm"), r"optimizer='adm'"),
        (Classifier(epochs=-1), r"received epochs=-1"),
        (Classifier(max_nb_epochs=5), r"epochs=100 and max_nb_epochs=5 exclude each other"),
        (Classifier(module="mlp"), r"Expected a class or function that makes a module.*received module='mlp'"),
        (Classifier(module=nn.Linear(4, 3), module__hidden=(3,)), r"module__hidden need a class or function"),
        (Classifier(module__depth=3), r"called as module\(n_features, n_outputs, depth=...\) and does not take that"),
        (Classifier(module=lambda: nn.Linear(4, 3)), r"called as module\(n_features, n_outputs\) and does not take"),
        (Classifier(module=lambda n_features, n_outputs: None), r"to return a torch.nn.Module, received None"),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value)[:40],
)
def test_what_cannot_be_trained_is_refused_in_fit_and_in_plain_words(estimator: Classifier, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        estimator.fit(BLOBS, LABELS)


def test_an_argument_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Classifier got hidden=3, but has no such argument.*module__hidden"):
        Classifier(hidden=3)
    with pytest.raises(ValueError, match="Invalid parameter 'hiden'"):
        Classifier().set_params(hiden=3)


@pytest.mark.parametrize("module", [nn.Linear(4, 5), nn.Linear(4, 2)], ids=str)
def test_a_module_of_another_width_than_the_classes_is_refused_in_fit(module: nn.Module) -> None:
    message = r"one number a class, \(N, 3\) for the classes \['ape', 'bee', 'cat'\], received .* shape \(N, [25]\)"
    with pytest.raises(ValueError, match=message):
        classifier(module=module, epochs=1).fit(BLOBS, LABELS)


def test_looking_at_the_width_changes_no_number() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    fitted = classifier(module=net, epochs=1, shuffle=False, learning_rate=0.01).fit(BLOBS, LABELS)
    model = fitkit.Model(copy.deepcopy(net), device="cpu")
    model.compile("adam", "cross_entropy", learning_rate=0.01)
    torch.manual_seed(int(np.random.RandomState(0).randint(np.iinfo(np.int32).max)))
    model.fit(BLOBS.astype(np.float32), NUMBERS, epochs=1, shuffle=False, verbose=0)
    assert all(map(torch.equal, fitted.module_.state_dict().values(), model.module.state_dict().values()))


def test_a_module_with_several_outputs_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self, n_features: int, n_outputs: int) -> None:
            super().__init__()
            self.layer = nn.Linear(n_features, n_outputs)

        def forward(self, x: Tensor) -> Any:
            output = self.layer(x)
            return output if self.training else (output, output)

    fitted = regressor(module=Two, epochs=1).fit(ROWS, VALUES)
    with pytest.raises(TypeError, match="one tensor as its output"):
        fitted.predict(ROWS)


def test_partial_fits_of_a_regressor_are_the_epochs_of_one_fit() -> None:
    options: dict[str, Any] = {"shuffle": False, "module": nn.Linear(4, 2)}
    parts = regressor(**options).partial_fit(ROWS, VALUES).partial_fit(ROWS, VALUES)
    whole = regressor(epochs=2, **options).fit(ROWS, VALUES)
    assert torch.equal(weights_of(parts), weights_of(whole))
