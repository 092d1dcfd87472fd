"""Callbacks: what watches and steers a run from its hooks; one callback, one file."""

from fitkit.callbacks.backup_and_restore import BackupAndRestore
from fitkit.callbacks.callback import Callback
from fitkit.callbacks.csv_logger import CSVLogger
from fitkit.callbacks.early_stopping import EarlyStopping
from fitkit.callbacks.every import Every
from fitkit.callbacks.lambda_callback import LambdaCallback
from fitkit.callbacks.learning_rate_scheduler import LearningRateScheduler
from fitkit.callbacks.lr_scheduler import LRScheduler
from fitkit.callbacks.mlflow_logger import MLflowLogger
from fitkit.callbacks.model_checkpoint import ModelCheckpoint
from fitkit.callbacks.progress_bar import ProgressBar
from fitkit.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
from fitkit.callbacks.swap_ema_weights import SwapEMAWeights
from fitkit.callbacks.tensorboard import TensorBoard
from fitkit.callbacks.terminate_on_nan import TerminateOnNaN
from fitkit.callbacks.timer import Timer
from fitkit.callbacks.wandb_logger import WandbLogger

__all__ = [
    "BackupAndRestore",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "Every",
    "LRScheduler",
    "LambdaCallback",
    "LearningRateScheduler",
    "MLflowLogger",
    "ModelCheckpoint",
    "ProgressBar",
    "ReduceLROnPlateau",
    "SwapEMAWeights",
    "TensorBoard",
    "TerminateOnNaN",
    "Timer",
    "WandbLogger",
]
