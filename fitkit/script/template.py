"""The scripts, as they read: one text with every line that a run may need, and what chooses among the lines.

A line that ends in ``#? words`` is there only when the words hold; ``$name`` is filled in. What a word means stands in
writer.py, where the run is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Template

CONDITION = re.compile(r"\s*#\? (?P<words>[\w ]+)$")

SCRIPT = '''\
"""$title

$about
"""

$imports

HERE = Path(__file__).parent
start = torch.load(HERE / "$start_file")
data = torch.load(HERE / "$data_file")  #? saves_data

$module
$conversion  #? converts
module.load_state_dict(start["module"])
for name in $frozen:  #? freezes
    module.get_parameter(name).requires_grad_(False)  #? freezes
compiled = torch.compile(module)  #? jit
$optimizer
parameters = [each for group in optimizer.param_groups for each in group["params"]]  #? some_parameters
optimizer.load_state_dict(start["optimizer"])  #? goes_on
$schedulers  #? schedules
$constants  #? has_constants
$training
$validation  #? validates


def compute($arguments):
    """The loss of a batch, and the number of things that it is a mean over."""
    $moving  #? moves
    with torch.autocast("$device", dtype=torch.bfloat16):  #? bf16
        $computing  #? bf16
    $computing  #? not bf16
    return loss, $weight


def mean(losses, weights):
    """The mean over all the data of what are means over batches."""
    weights = torch.tensor(weights, dtype=torch.float64)
    losses = torch.stack(losses).cpu().double() if losses else weights  # none: nan  #? ignores
    return float((losses * weights).sum() / weights.sum())  #? ignores
    return float((torch.stack(losses).cpu().double() * weights).sum() / weights.sum())  #? not ignores


def train_mode():  #? evals
    """What stays in evaluation mode is what was in it."""  #? evals
    module.train()  #? evals
    for name in $evals:  #? evals
        module.get_submodule(name).eval()  #? evals
  #? evals
  #? evals
def evaluate():  #? validates
    """The mean loss over the validation data, which leaves no trace."""  #? validates
    losses, weights = [], []  #? validates
    module.eval()  #? validates
    with torch.no_grad(), torch.random.fork_rng($fork):  #? validates
        for $validation_batch in $validation_batches:  #? validates
            loss, weight = compute($validation_given)  #? validates
            if weight:  #? validates ignores
                losses.append(loss)  #? validates ignores
                weights.append(weight)  #? validates ignores
            losses.append(loss)  #? validates not ignores
            weights.append(weight)  #? validates not ignores
    module.train()  #? validates not evals
    train_mode()  #? validates evals
    return mean(losses, weights)  #? validates
  #? validates
  #? validates
best, waited = None, 0  #? stops
best_weights = None  #? restores
accumulate = $accumulate  #? windows not changes_windows
$seed
train_mode()  #? evals
for epoch in range($epochs):
    accumulate = $accumulate  #? changes_windows
    for group in optimizer.param_groups:  #? sets_rates
        group["lr"] = $rate  #? sets_rates
    losses, weights = [], []
    norms = []  #? norms
    for $batch in $training_batches:  #? not windows
        loss, weight = compute($given)  #? not windows
        if not weight:  # nothing in this batch counts  #? not windows ignores
            continue  #? not windows ignores
        optimizer.zero_grad()  #? not windows
        loss.backward()  #? not windows
        $step  #? not windows
        losses.append(loss.detach())  #? not windows
        weights.append(weight)  #? not windows
    for index, $batch in enumerate($training_batches):  #? windows
        loss, weight = compute($given)  #? windows
        if index % accumulate == 0:  # a window opens; the epoch's last one may be short  #? windows
            optimizer.zero_grad()  #? windows
            expected, held = min(accumulate, batches - index) * $first_weight, 0  #? windows
        if weight:  #? windows ignores
            (loss * (weight / expected)).backward()  #? windows ignores
            held += weight  #? windows ignores
            losses.append(loss.detach())  #? windows ignores
            weights.append(weight)  #? windows ignores
        (loss * (weight / expected)).backward()  #? windows not ignores
        held += weight  #? windows not ignores
        losses.append(loss.detach())  #? windows not ignores
        weights.append(weight)  #? windows not ignores
        is_complete = (index + 1) % accumulate == 0 or index + 1 == batches  #? windows
        if is_complete and held:  #? windows ignores
            $closing  #? windows ignores
            $step  #? windows ignores
        if is_complete:  #? windows not ignores
            $closing  #? windows not ignores
            $step  #? windows not ignores

    loss = mean(losses, weights)
    print(f"epoch {epoch + 1}: loss {loss:.5g}")
    print(f"  gradient norm {torch.stack(norms).mean():.5g}")  #? norms
    if not isfinite(loss):  #? raises
        raise FloatingPointError(f"the loss of epoch {epoch + 1} is {loss}")  #? raises
    $epoch_schedules  #? schedules_epochs
    if $validates_now:  #? validates sometimes
        $judging  #? validates sometimes
    $judging  #? validates not sometimes
    $stopping  #? stops_on_loss
    if not isfinite(loss):  #? breaks
        break  #? breaks

if best_weights is not None:  #? restores
    module.load_state_dict(best_weights)  #? restores
torch.save(module.state_dict(), HERE / "$trained_file")
'''

CLOSING = """\
if held != expected:  # its batches were not all as large as its first
    for parameter in $all_parameters:
        if parameter.grad is not None:
            parameter.grad *= expected / held
"""

STEP = """\
gradients = [each.grad for each in $all_parameters]  #? other_norms
gradients = [each for each in gradients if each is not None]  #? other_norms
norms.append(nn.utils.get_total_norm(gradients, $order))  #? other_norms
norms.append(nn.utils.clip_grad_norm_($all_parameters, $clip))  #? clips same_norm
nn.utils.clip_grad_norm_($all_parameters, $clip)  #? clips not same_norm
optimizer.step()
$step_schedules  #? schedules_steps
"""

JUDGING = """\
val_loss = evaluate()
print(f"  val_loss {val_loss:.5g}")
$plateau_schedules  #? schedules_plateaus
$stopping  #? stops_on_val_loss
"""

STOPPING = """\
waited += 1
if not isnan($monitor) and (best is None or $improved):
    best, waited = $monitor, 0  #? not baseline
    best = $monitor  #? baseline
    waited = 0 if $beats else waited  #? baseline
    best_weights = deepcopy(module.state_dict())  #? restores
if waited >= $patience:  #? not least
    break  #? not least
if waited >= $patience and epoch + 1 >= $least_epochs:  #? least
    break  #? least
"""


def render(template: str, words: Mapping[str, bool], values: Mapping[str, str]) -> str:
    """The template's lines that hold, filled in. A value of several lines keeps the columns of its place.

    Args:
        template: one of the texts above.
        words: what holds.
        values: by the name after ``$``.
    """
    lines = []
    for line in template.splitlines():
        condition = CONDITION.search(line)
        if condition is not None:
            if not _holds(condition["words"], words):
                continue
            line = line[: condition.start()]
        if line.strip().startswith("$") and line.strip()[1:] in values:
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + each if each else "" for each in values[line.strip()[1:]].splitlines()]
        else:
            lines.append(Template(line).substitute(values))
    return "\n".join(lines) + "\n"


def _holds(text: str, words: Mapping[str, bool]) -> bool:
    negated = False
    for word in text.split():
        if word == "not":
            negated = True
        elif words[word] is negated:
            return False
        else:
            negated = False
    return True
