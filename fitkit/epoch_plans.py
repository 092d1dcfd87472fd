"""How much of the data an epoch takes: all of it, so many batches, or a fraction.

Each function makes an `EpochPlan`, which is what the loop is given, and refuses a number that the data cannot give.
"""

from __future__ import annotations

import torch

from fitkit.data import Batches, EpochPlan
from fitkit.data.shares import SharedBatches
from fitkit.distributed import Processes
from fitkit.errors import check_integer
from fitkit.flags import TrainingFlags


def plan_for_pass(batches: Batches, steps: int | None, device: torch.device, processes: Processes | None) -> EpochPlan:
    """What one evaluation or prediction takes."""
    if steps is not None:
        check_integer("steps", steps, least=1)
    plan = EpochPlan(_shared(batches, processes, device), steps, "data", "steps")
    plan.noted = False  # no file goes on in its midst
    return plan


def plan_for_training(
    batches: Batches, flags: TrainingFlags, device: torch.device, processes: Processes | None
) -> EpochPlan:
    """What an epoch of a fit trains on."""
    fraction, name = flags.train_percent_check, "train_percent_check"
    if flags.overfit_pct:
        fraction, name = flags.overfit_pct, "overfit_pct"
        batches = batches.in_order()
    limit = _limit(batches, flags.steps_per_epoch, fraction, name, "steps_per_epoch")
    shared = _shared(batches, processes, device, training=True)
    plan = EpochPlan(shared, limit, "data", "steps_per_epoch", device=device)
    plan.check_epochs(flags.last_epoch - flags.initial_epoch)
    return plan


def plan_for_validation(
    batches: Batches, flags: TrainingFlags, device: torch.device, processes: Processes | None
) -> EpochPlan:
    """What each validation of a fit takes."""
    fraction, name = flags.val_percent_check, "val_percent_check"
    if flags.overfit_pct:
        fraction, name = flags.overfit_pct, "overfit_pct"
        batches = batches.in_order()
    limit = _limit(batches, flags.validation_steps, fraction, name, "validation_steps")
    shared = _shared(batches, processes, device)
    plan = EpochPlan(shared, limit, "validation_data", "validation_steps", anew=True)
    if not batches.again:
        plan.check_epochs(sum(map(flags.validates, range(flags.initial_epoch, flags.last_epoch))))
    return plan


def _shared(batches: Batches, processes: Processes | None, device: torch.device, *, training: bool = False) -> Batches:
    return batches if processes is None else SharedBatches(batches, processes, device, training=training)


def _limit(batches: Batches, steps: int | None, fraction: float, name: str, steps_name: str) -> int | None:
    """Batches in an epoch by count or by fraction; None is all."""
    whole = fraction == 1.0 and name != "overfit_pct"
    if steps is not None:
        if not whole:
            raise ValueError(f"{steps_name}={steps} and {name}={fraction} exclude each other. Pass one of them.")
        return steps
    if fraction == 1.0:
        return None
    if batches.length is None:
        raise ValueError(
            f"{name}={fraction} is a fraction of data that does not tell its length. Pass {steps_name}=... instead."
        )
    return max(1, int(batches.length * fraction))
