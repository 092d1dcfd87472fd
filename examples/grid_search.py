"""scikit-learn's grid search over a torch module: its shape, the optimizer's rate and the training flags.

`fitkit.sklearn.Classifier` is an estimator as any other: in a pipeline, in GridSearchCV, in cross_val_score, cloned and
pickled. The module is made anew for each candidate, with the arguments that the grid names as module__....
"""

from __future__ import annotations

import pickle

import pandas as pd
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fitkit.sklearn import Classifier


class Net(nn.Module):
    """Numbers of shape (N, n_features) to logits of shape (N, n_outputs)."""

    def __init__(self, n_features: int, n_outputs: int, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_features, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, n_outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


torch.set_num_threads(1)  # For a module this small, more threads would mostly wait for each other.

digits = load_digits()
x, x_test, y, y_test = train_test_split(digits.data, digits.target, stratify=digits.target, random_state=0)

pipeline = make_pipeline(StandardScaler(), Classifier(Net, epochs=8, random_state=0))
grid = {
    "classifier__learning_rate": [0.001, 0.01],
    "classifier__module__width": [16, 64],
    "classifier__module__dropout": [0.0, 0.3],
}
search = GridSearchCV(pipeline, grid, cv=3).fit(x, y)

table = pd.DataFrame(search.cv_results_["params"]).rename(columns=lambda name: name.removeprefix("classifier__"))
table["accuracy"] = search.cv_results_["mean_test_score"]
print(table.sort_values("accuracy", ascending=False).round(3).to_string(index=False))

best = search.best_estimator_
print(f"\nthe best one, on {len(x_test)} images that the search has not seen: {best.score(x_test, y_test):.1%}")
again = pickle.loads(pickle.dumps(best))
print(f"the same after pickling: {(again.predict(x_test) == best.predict(x_test)).all()}")
