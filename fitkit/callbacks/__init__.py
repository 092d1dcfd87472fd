"""Callbacks: what watches and steers a run from its hooks; one callback, one file."""

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.early_stopping import EarlyStopping
from fitkit.callbacks.lambda_callback import LambdaCallback
from fitkit.callbacks.progress_bar import ProgressBar

__all__ = ["Callback", "EarlyStopping", "LambdaCallback", "ProgressBar"]
