"""Callbacks: what watches and steers a run from its hooks; one callback, one file."""

from fitkit.callbacks.backup_and_restore import BackupAndRestore
from fitkit.callbacks.callback import Callback
from fitkit.callbacks.early_stopping import EarlyStopping
from fitkit.callbacks.lambda_callback import LambdaCallback
from fitkit.callbacks.model_checkpoint import ModelCheckpoint
from fitkit.callbacks.progress_bar import ProgressBar

__all__ = ["BackupAndRestore", "Callback", "EarlyStopping", "LambdaCallback", "ModelCheckpoint", "ProgressBar"]
