"""Keras's compile, fit, evaluate and predict for any torch.nn.Module, with numbers that stay exact."""

from fitkit import callbacks
from fitkit._version import __version__
from fitkit.errors import CheckpointError, NonFiniteLossError
from fitkit.history import History
from fitkit.model import Model

__all__ = ["CheckpointError", "History", "Model", "NonFiniteLossError", "__version__", "callbacks"]
