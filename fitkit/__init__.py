"""Keras's compile, fit, evaluate and predict for any torch.nn.Module, with numbers that stay exact."""

# Before anything of fitkit: from deep within its modules, importing torch takes 4 % longer.
import torch as _torch  # noqa: F401

from fitkit import callbacks
from fitkit._version import __version__
from fitkit.errors import CheckpointError, NonFiniteLossError
from fitkit.history import History
from fitkit.model import Model

__all__ = ["CheckpointError", "History", "Model", "NonFiniteLossError", "__version__", "callbacks"]
