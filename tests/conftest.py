"""What holds for every test: a fixed seed, and hypothesis without a clock."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# The tensors of tests are tiny: threads would only wait for each other. torch reads this when it is imported, and the
# processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What counts its users over the network does not count tests.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings

# Deadlines would judge the machine. CI draws the same examples each time, a developer new ones.
settings.register_profile("fitkit", deadline=None, max_examples=25, derandomize="CI" in os.environ)
settings.load_profile("fitkit")


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Each test draws the same numbers, alone or after others, and leaves torch's defaults as it found them."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
