"""The numbers of each epoch in a run of MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.extras import check_hyperparameters, import_extra, measured_numbers


@final
class MLflowLogger(Callback):
    """Logs each epoch's numbers to MLflow, with the 0-based epoch as step, the learning rate among them.

    It logs to the run that is active when the first epoch begins and leaves that open. Without one it starts a run
    and ends it: "FINISHED", "KILLED" after Ctrl-C, "FAILED" after any other error. Where runs are kept is MLflow's
    business: ``mlflow.set_tracking_uri``, ``mlflow.set_experiment`` and its environment variables. A resumed fit goes
    on in the run that it began.

    Args:
        run_name: of the run that it starts; None lets MLflow choose.
        hyperparameters: {name: value}, logged as the run's parameters.

    Attributes:
        run_id: of the latest run, None before the first epoch.

    Raises:
        ImportError: mlflow is not installed.
        TypeError: hyperparameters is no mapping of names.
    """

    adds_to_logs = ()
    only_on_rank_0 = True

    def __init__(self, run_name: str | None = None, *, hyperparameters: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        import_extra("mlflow", "mlflow", "MLflowLogger")
        self.run_name = run_name
        self.hyperparameters = check_hyperparameters(hyperparameters)
        self.run_id: str | None = None
        self._is_open = False
        self._is_own = False

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Forgets the fit before."""
        self.run_id = None
        self._is_open = self._is_own = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Opens the run before the first epoch."""
        if self._is_open:
            return
        mlflow = import_extra("mlflow", "mlflow", "MLflowLogger")
        active = mlflow.active_run()
        self._is_own = active is None
        # A resumed fit knows the run that it began, and MLflow takes a run's parameters only once.
        is_new = self.run_id is None
        run = mlflow.start_run(run_id=self.run_id, run_name=self.run_name) if active is None else active
        self._is_open = True
        self.run_id = run.info.run_id
        if self.hyperparameters and is_new:
            mlflow.MlflowClient().log_batch(
                self.run_id, params=[mlflow.entities.Param(key, str(v)) for key, v in self.hyperparameters.items()]
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Logs the epoch."""
        mlflow = import_extra("mlflow", "mlflow", "MLflowLogger")
        mlflow.log_metrics(measured_numbers(self, logs), step=epoch, run_id=self.run_id)

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Ends the run that it started."""
        self._end("FINISHED")

    def on_exception(self, error: BaseException) -> None:
        """Ends the run that it started as one that failed."""
        self._end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _end(self, status: str) -> None:
        if self._is_open and self._is_own:
            import_extra("mlflow", "mlflow", "MLflowLogger").end_run(status)
        self._is_open = self._is_own = False

    def state_dict(self) -> dict[str, Any]:
        """Which run it is."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on in that run; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.
        """
        self.run_id = state["run_id"]
