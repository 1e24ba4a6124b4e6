"""The first stage of a distillation: each layer's own parameters, fitted to the teacher's attention on the teacher's inputs.

    teacher's forward, no gradient:   q, k, v ──> original attention ──> goes on
                                         └─────> operator ──> compared with it, layer by layer

No layer sees another's error, and what is learned of a layer reaches its own parameters alone, so no gradient passes the backbone. Each
part says how its tensors are found (`Part.fit`): SLA's projection and the weights of a depthwise convolution by least squares, for the
output is linear in them; the mass merge's offset and CLEAR's pooling weights by descent; what chooses blocks, which has no gradient, by
descent of a loss of its own (`choices.Chooser`); those of a part that says none of it keep their start values. A few parts start from the
tokens of the first recorded forward that runs them (`Part.start`).

The order of a step, after its forwards: first the tensors that descend take their step, with those that are solved for as they are; then
each of these is solved for. Where one spec has both, each step changes what is left to solve for: there a step's sums count for less with
every later one (`KEPT`), so that the solution follows, and both come to rest as the learning rate falls. A projection and a convolution of
one layer are solved for in turn, each at every second step.
"""

import functools
import math
import random
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers.utils.logging import tqdm
from torch import Tensor, nn

from dit_accel.errors import DistillationError
from dit_accel.finetune import checkpoints
from dit_accel.finetune.calls import calls_of
from dit_accel.finetune.descent import ChoiceDescent, Descent, choice_losses, mean_of
from dit_accel.finetune.least_squares import SOLVED, ChannelLeastSquares, Solver, solved
from dit_accel.finetune.losses import relative_error
from dit_accel.finetune.processes import from_main, is_main, share, summed
from dit_accel.finetune.session import Distillation, fresh_tensors
from dit_accel.finetune.teacher import comparing_with_teacher, keep_better, values_of
from dit_accel.finetune.velocity import predict
from dit_accel.method.parts.base import Part
from dit_accel.patch.processor import AcceleratedAttention
from dit_accel.patch.state import operators_of

STARTED = "start/"  # how the names of the start values begin in a checkpoint
NOT_KEPT = (
    "was written by a version that did not keep the start values: no layer is compared with them, so one that is worse for the first stage "
    "stays so. Begin anew in another output_dir to have them compared"
)
START_FORWARDS = 64  # as many are looked at for the start values; parts of one noise range may be absent from the first
PROBE = 64.0  # added to a projection to read the rest off the output: large, so that a low-precision output rounds the rest and not more
RIDGE = 0.03  # of the regressors' mean square; built-in model, SLA 10 %, 256 px: held-out error 0.274, at 1e-6 0.301 and at 0.1 0.276
# chosen layer by layer from 0.003 to 3 by what it left of held-out prompts' attention, six prompts: velocity error 0.335, not 0.295


class Fitter(Protocol):
    """How parameters are fitted. `learn` takes in one call of one layer; `update` ends a step; `tensors` and `load` are its state."""

    def learn(self, operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None: ...

    def update(self, step: int) -> None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


def fit(run: Distillation, progress: bool) -> None:
    """Run the first stage, from its start or its newest checkpoint; layers that are no better for it keep their start values."""
    operators = operators_of(run.transformer)
    run.transformer.requires_grad_(False)
    for operator in operators.values():
        operator.params.float()
    fitter = _fitter(run, operators)
    start, found = 0, checkpoints.newest(run, checkpoints.PARAMETERS)
    tensors: dict[str, Tensor] = {}
    if found is not None:
        tensors = checkpoints.load(run, found)
        fitter.load(tensors)
        start = len(run.parameter_history)
    began = {name.removeprefix(STARTED): tensor for name, tensor in tensors.items() if name.startswith(STARTED)}
    start_values = began if found is not None else values_of(operators)
    run.write_log("parameters.jsonl", run.parameter_history, anew=True)
    steps, shown = range(start, run.parameter_steps), progress and is_main()
    bar = tqdm(steps, initial=start, total=run.parameter_steps, desc="parameters", disable=None if shown else True)
    for step in bar:
        held_out = {} if step else {"held_out_choice_before": _held_out_choice(run)}
        with run.spec_drawn(checkpoints.PARAMETERS, step) as drawn, run.timed_step():
            means = _step(run, fitter, step)
        bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
        if step + 1 == run.parameter_steps:
            held_out |= {"held_out_choice": _held_out_choice(run)}
        row = {"step": step + 1, **means, **drawn, "seconds": run.seconds}
        row |= {name: loss for name, loss in held_out.items() if loss is not None}
        run.parameter_history.append(row)
        run.write_log("parameters.jsonl", [row])
        if (step + 1) % run.config.checkpoint_every == 0 or step + 1 == run.parameter_steps:
            named = {STARTED + name: tensor for name, tensor in start_values.items()}
            checkpoints.save(run, checkpoints.PARAMETERS, step + 1, fitter.tensors() | named)
    if start_values:
        keep_better(run, start_values)
    elif is_main():
        warnings.warn(f"dit_accel: {found} {NOT_KEPT}", stacklevel=2)


def _fitter(run: Distillation, operators: Mapping[str, AcceleratedAttention]) -> Fitter:
    """What fits the layers' parameters, each tensor as its part says. Those that descend have gradients from now on, no others."""
    projected, convolved = ({name: op for name, op in operators.items() if way in op.fit.values()} for way in SOLVED)
    found: dict[str, Fitter] = {}
    if projected:
        found["linear"] = LeastSquares(projected)
    if convolved:
        found["channels"] = ChannelLeastSquares(convolved)
    others, choices = Descent(operators, run), ChoiceDescent(operators, run)
    if others.parameters or not (found or choices.parameters):
        found["others"] = others
    if choices.parameters:
        found["choices"] = choices
    return next(iter(found.values())) if len(found) == 1 else Combined(found)


def _step(run: Distillation, fitter: Fitter, step: int) -> dict[str, float]:
    """Fit to `batch_size` recorded forwards; returns the means before this step's update: "attention", the relative error of the layers'
    outputs, and "choice", the loss of what chooses blocks, where something does."""
    size = run.config.batch_size
    errors: list[Tensor] = []

    def learn(operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        errors.append(relative_error(out.detach(), target))
        fitter.learn(operator, arguments, out, target)

    for item in share(size):
        position = _position(run, step * size + item)
        forward = run.samples[position]
        with run.replayed(run.moment(position)), run.autocast(), comparing_with_teacher(run, learn):
            predict(run.transformer, forward.arguments)
    if not errors:
        raise DistillationError(
            f"no layer was accelerated in a recorded forward: {run.patch.context.assignment} has nothing to fit its parameters to"
        )
    (totals,) = summed([torch.stack([torch.stack(errors).double().sum(), errors[0].new_tensor(len(errors), dtype=torch.float64)])])
    error = float(totals[0] / totals[1])
    if not totals[0].isfinite():
        raise DistillationError(f"the attention's error at step {step} of the parameters is {error}; lower parameter_learning_rate")
    means, choices = {"attention": error}, _choices(fitter)
    if choices is not None and (loss := mean_of(choices.losses, run.device)) is not None:
        choices.losses.clear()
        if not math.isfinite(loss):
            raise DistillationError(f"the loss of the choice of blocks at step {step} is {loss}; lower parameter_learning_rate")
        means["choice"] = loss
    fitter.update(step)
    return means


def _choices(fitter: Fitter) -> ChoiceDescent | None:
    """What fits the choices of blocks."""
    way = fitter.ways.get("choices") if isinstance(fitter, Combined) else fitter
    return way if isinstance(way, ChoiceDescent) else None


def _held_out_choice(run: Distillation) -> float | None:
    """The loss of what chooses blocks on the held-out forwards, of which each process evaluates its share; None where nothing does."""
    if not any("choice" in operator.fit.values() for operator in operators_of(run.transformer).values()):
        return None
    losses: list[Tensor] = []

    def learn(operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        losses.extend(choice_losses(operator, arguments))

    with torch.no_grad():
        for position in share(len(run.held_out)):
            forward = run.held_out[position]
            with run.replayed(run.held_out_moment(position)), run.autocast(), comparing_with_teacher(run, learn):
                predict(run.transformer, forward.arguments)
    return mean_of(losses, run.device)


def set_start_values(run: Distillation) -> None:
    """Give what parts learn the values that they take from the first recorded forward that runs them, where it still has those of an
    untrained method. Warns of parts that none of the first START_FORWARDS runs.
    """
    operators = operators_of(run.transformer)
    missing = {(layer, part) for layer, op in operators.items() for spec in op.specs for part in spec.parts() if part.starts}
    found: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}
    seen: set[tuple[str, Part]] = set()

    def learn(operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        for part, heads, call in calls_of(operator, arguments):
            if part.starts:
                seen.add((operator.name, part))
                for name, value in part.start(call).items():
                    found.setdefault((operator.name, name, heads), value.cpu())

    for number in range(min(len(run.positions), START_FORWARDS)):
        if missing <= seen:
            break
        position = _position(run, number)
        forward = run.samples[position]
        with torch.no_grad(), run.replayed(run.moment(position)), run.autocast(), comparing_with_teacher(run, learn):
            predict(run.transformer, forward.arguments)
    if left := sorted({str(part) for _, part in missing - seen}):
        warnings.warn(f"no recorded forward runs {', '.join(left)}, which starts as an untrained method does", stacklevel=2)
    fresh = {name: fresh_tensors(operator) for name, operator in operators.items()}
    for (layer, name, heads), value in from_main(found).items():
        if name in fresh[layer]:
            parameter = operators[layer].params.float().get_parameter(name)
            with torch.no_grad():
                parameter[list(heads)] = value.to(parameter)


def _position(run: Distillation, number: int) -> int:
    """Which recorded forward is the n-th to be learned from: all once in the order that the seed gives, then all in another."""
    count = len(run.positions)
    return run.positions[_order(f"{run.config.seed} parameters {number // count}", count)[number % count]]


@functools.lru_cache(maxsize=1)
def _order(seed: str, count: int) -> list[int]:
    """Numbers below `count` in an order that the seed gives; kept, as millions of forwards take seconds to shuffle."""
    return random.Random(seed).sample(range(count), count)


class LeastSquares(Solver):
    """A projection by ridge-regularised least squares of what the exact part lacks, over all calls so far, each weighted by the inverse of
    the original output's size. `sums`: of each layer `[D + 1, 2D + 1]`, X the rest and a one.
    """

    way = "least_squares"

    @staticmethod
    def _zeros(operator: AcceleratedAttention) -> Tensor:
        device, width = next(operator.parameters()).device, operator.head_dim + 1
        return torch.zeros(width, width + operator.head_dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def learn(self, operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        weight, bias = (getattr(operator.params.proj, name) for name in ("weight", "bias"))
        identity = torch.eye(len(bias), device=bias.device)
        out = out.detach()
        rest = (self._moved(operator, arguments, weight, identity) - out.double()) / PROBE
        ones = ((self._moved(operator, arguments, bias, torch.ones_like(bias)) - out.double()) / PROBE)[..., :1].round()  # 0 for text
        size = target.double().square().sum().clamp_min(1e-12)
        for r, one, o, w in zip(*(x.flatten(0, 1) for x in (rest, ones, out, target)), strict=True):  # head by head: float64 is large
            x = torch.cat([r, one], 1)
            exact = o.double() - x @ torch.cat([weight.T, bias[None]]).double()
            self._batch[operator.name] += x.T @ torch.cat([x, w.double() - exact], 1) / size

    def _moved(self, operator: AcceleratedAttention, arguments: tuple[Any, ...], parameter: nn.Parameter, direction: Tensor) -> Tensor:
        """The operator's output with one parameter moved by PROBE times a direction."""
        value = parameter.clone()
        try:
            parameter.copy_(value + PROBE * direction)
            return operator.forward(*arguments).double()
        finally:
            parameter.copy_(value)

    @staticmethod
    def _solve(operator: AcceleratedAttention, sums: Tensor) -> None:
        solution = solved(sums, RIDGE)
        projection: Any = operator.params.proj
        projection.weight.copy_(solution[:-1].T)
        projection.bias.copy_(solution[-1])


class Combined:
    """Several ways by name, each for tensors of its own, of the same layers or of others: what descends first, see above."""

    def __init__(self, ways: Mapping[str, Fitter]) -> None:
        self.ways = ways

    def learn(self, operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        for way in reversed(list(self.ways.values())):
            if not isinstance(way, Solver) or operator.name in way.operators:
                way.learn(operator, arguments, out, target)

    def update(self, step: int) -> None:
        for way in reversed(list(self.ways.values())):
            way.update(step)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": value for name, way in self.ways.items() for key, value in way.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, way in self.ways.items():
            way.load({key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")})
