"""One distillation under way: what it works on, and what is checked and collected before it starts."""

import contextlib
import functools
import json
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from dit_accel.errors import DistillationError
from dit_accel.files import append_text, check_folder, write_bytes, write_text
from dit_accel.finetune.config import DistillConfig
from dit_accel.finetune.curve import draw_curve
from dit_accel.finetune.data.collect import Samples, collect_prompts
from dit_accel.finetune.flow import Flow, recorded_flow
from dit_accel.finetune.moments import Moments
from dit_accel.finetune.processes import gathered, is_main, processes, share, shared_gpus, together
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.method.assignment import Moment, groups
from dit_accel.patch.anatomy import check_unfused, projection_names
from dit_accel.patch.fingerprint import known_hash
from dit_accel.patch.heads import joint_parameters
from dit_accel.patch.holders import Holders, is_offloaded, is_plain
from dit_accel.patch.lora import ADAPTER, check_user_lora_unfused, switched_off
from dit_accel.patch.modes import at_moment, running
from dit_accel.patch.processor import AcceleratedAttention
from dit_accel.patch.state import Patch, operators_of, patches_of

# of the first stage, unless the config says. A projection is better off for them (built-in model, SLA 10 % at 256 px, held-out error
# from 0.344 to 0.274); offsets and pooling weights learn as much from ordinary steps (Fovea 5 %: 0.242 both)
PARAMETER_STEPS = 48


@dataclass
class Distillation:
    """One distillation under way. All processes hold the same history; the main one alone writes."""

    pipe: Any
    transformer: Any
    patch: Patch
    config: DistillConfig
    samples: Samples
    held_out: Samples
    folder: Path
    parameter_steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    parameter_history: list[dict[str, float]] = field(default_factory=list)
    error_before: float = 0.0
    error_fitted: float | None = None
    seconds: float = 0.0  # that the steps of both stages have taken, over all resumptions; the main process's clock

    @functools.cached_property
    def flow(self) -> Flow:
        """How the samples name noise levels, for flow matching."""
        return recorded_flow(self.pipe, self.patch.context.family, self.samples)

    @functools.cached_property
    def moments(self) -> Moments:
        """Where in their runs the samples' forwards are."""
        return Moments(self.samples, self.pipe, self.patch.context.family)

    @functools.cached_property
    def positions(self) -> Sequence[int]:
        """The forwards to be learned from: those in which the assignment runs a spec, whatever their size.

        Raises DistillationError where there is none.
        """
        context = self.patch.context
        if not context.assignment.of_moments:
            return range(len(self.samples))
        found = [n for n in range(len(self.samples)) if self.runs_at(self.moments[n])]
        if not found:
            raise DistillationError(f"no sample is at a step and noise level at which {context.assignment} runs a spec: collect others")
        return found

    def runs_at(self, moment: Moment) -> bool:
        """Whether the assignment runs a spec in some layer at a moment, whatever the size."""
        context = self.patch.context
        rules = context.assignment.at(moment, None)
        return any(group.spec is not None for layer in context.layers for group in groups(rules, layer.name, layer.heads))

    def replayed(self, moment: Moment | None) -> contextlib.AbstractContextManager[Any]:
        """The transformer in a forward of a moment, for a `with` block; None where it does not matter."""
        return contextlib.nullcontext() if moment is None else at_moment(self.transformer, moment)

    def moment(self, position: int) -> Moment | None:
        """Of one of the samples' forwards; None where it does not matter, so that nothing is read."""
        return self.moments[position] if self.patch.context.assignment.of_moments else None

    @property
    def projected(self) -> bool:
        """Whether the method's parameters are a projection, which least squares find."""
        return any(operator.solved for operator in operators_of(self.transformer).values())

    @property
    def parameter_rate(self) -> float:
        """Learning rate of the method's own parameters. Large steps undo a fit: built-in model, SLA 10 % at 256 px, held-out error 0.274
        after the fit; 48 steps with a LoRA later 0.282 at 1e-2, 0.252 at 1e-3."""
        if self.config.parameter_learning_rate is not None:
            return self.config.parameter_learning_rate
        return 1e-3 if self.parameter_steps and self.projected else 1e-2

    def held_out_error(self) -> float:
        """Mean relative error of the prediction on the held-out forwards, of which each process evaluates its share."""
        mine = share(len(self.held_out))
        moments = [self._held_out_moments[i] for i in mine] if self.patch.context.assignment.of_moments else None
        errors = gathered(velocity_errors(self.transformer, (self.held_out[i] for i in mine), moments))
        return float(sum(errors) / len(errors))

    def held_out_moment(self, position: int) -> Moment | None:
        """The same as `moment`, of a held-out forward."""
        return self._held_out_moments[position] if self.patch.context.assignment.of_moments else None

    @functools.cached_property
    def _held_out_moments(self) -> Moments:
        return Moments(self.held_out, self.pipe, self.patch.context.family)

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.transformer.parameters()).device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of the training passes, for a `with` block."""
        if self.config.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextlib.contextmanager
    def timed_step(self) -> Iterator[None]:
        """Adds the time of a `with` block to `seconds`. A GPU's last work on a step is counted in the step after it."""
        start = time.perf_counter()
        yield
        self.seconds += gathered([time.perf_counter() - start])[0]

    def add_row(self, row: dict[str, float]) -> None:
        """Put a row, with the seconds so far, at the end of the history and of its log."""
        self.history.append(row | {"seconds": self.seconds})
        self.write_log("log.jsonl", self.history[-1:])

    def write_curve(self) -> None:
        """Draw the history so far as curve.png in the folder."""
        if is_main():
            with _interrupts_held_back():
                write_bytes(self.folder / "curve.png", draw_curve(self.history))

    @contextlib.contextmanager
    def spec_drawn(self, stage: str, step: int) -> Iterator[dict[str, float]]:
        """The method that a step runs, for the length of a `with` block; gives what the log says of it."""
        if not self.config.specs:
            yield {}
            return
        number = random.Random(f"{self.config.seed} {stage} {step} spec").randrange(len(self.config.specs))
        with running(self.transformer, self.config.specs[number]):
            yield {"spec": number}

    def methods(self) -> list[contextlib.AbstractContextManager[Any]]:
        """A `with` block for each method that steps draw from, in which the transformer runs it: one for its own where they draw none."""
        return [running(self.transformer, spec) for spec in self.config.specs] or [contextlib.nullcontext()]

    def write_log(self, name: str, rows: Sequence[dict[str, float]], *, anew: bool = False) -> None:
        """Append rows to a log in the folder, or begin it with them."""
        if is_main():
            (write_text if anew else append_text)(self.folder / name, "".join(json.dumps(row) + "\n" for row in rows))


def prepare(pipe: Any, source: Any, held_out: Any, config: DistillConfig, call: dict[str, Any]) -> Distillation:
    """Check everything that can be checked, and collect what has to be sampled."""
    patches = patches_of(pipe)
    if len(patches) != 1:
        raise DistillationError(f"distill trains one transformer, but the pipeline has {len(patches)} accelerated ones: pass one of them")
    transformer, patch = patches[0]
    _check_launch()
    _check_specs(transformer, patch, config)
    present = getattr(transformer, "peft_config", {}).get(ADAPTER)
    if is_offloaded(transformer):
        raise DistillationError(f"{type(transformer).__name__} is offloaded: distil before offloading")
    if config.train == "lora" and present is None:
        check_user_lora_unfused(transformer, DistillationError)
    if config.train == "attention":
        _check_plain(transformer, patch)
    if config.train == "lora" and present is not None and present.r != config.lora_rank:
        raise DistillationError(f"the model has our LoRA of rank {present.r} already, not {config.lora_rank}: set lora_rank={present.r}")
    if config.train == "lora" and switched_off(transformer):
        raise DistillationError("LoRA is disabled on this model, and ours would be too: call enable_lora() or delete_adapters() first")
    if config.train != "parameters":
        projection_names(transformer, patch.originals)  # raises for a layer that has none
        check_unfused(transformer, patch.originals, DistillationError)
    if isinstance(source, str | Path) and Path(source).is_file():
        raise DistillationError(f"{source} is a file: pass its lines as a list of prompts, or a folder made by collect")
    device = next(transformer.parameters()).device
    count = processes(device).num_processes
    if shared := shared_gpus(device):
        raise DistillationError(
            f"several processes have their model on one GPU ({', '.join(shared)}): give each its own, with "
            'pipe.to(f"cuda:{os.environ[\'LOCAL_RANK\']}") in the place of pipe.to("cuda")'
        )
    if together():
        _check_together(transformer, patch, config)
    elif config.batch_size % count:
        raise DistillationError(f"batch_size must be a multiple of {count}, the number of processes that share it, not {config.batch_size}")
    folder = Path(config.output_dir)
    check_folder(folder)
    if held_out is None:
        if isinstance(source, Samples | str | Path):
            raise DistillationError("pass held_out= when training from recorded samples")
        source = list(source)
        count = max(1, len(source) // 10)
        if len(source) < 2:
            raise DistillationError(f"distill requires at least two prompts, one of them to hold out, not {len(source)}")
        source, held_out = source[:-count], source[-count:]
    source, held_out = (Samples(part) if isinstance(part, str | Path) else part for part in (source, held_out))
    _check_disjoint(source, held_out)  # before sampling, which may take days
    if config.train == "parameters" and not any(list(op.parameters()) for op in operators_of(transformer).values()):
        raise DistillationError(f"train={config.train!r} leaves nothing to train: {patch.context.assignment} has no parameters of its own")
    if config.train == "parameters" and all(_only_chooses(operator) for operator in operators_of(transformer).values()):
        reason = f"what {patch.context.assignment} learns only chooses blocks, which has no gradient"
        raise DistillationError(f"train={config.train!r} leaves nothing to train: {reason}. Train 'lora' or 'attention'")
    steps = _parameter_steps(transformer, config, folder)
    samples = _samples(pipe, source, folder / "samples", config.seed, call)
    evaluated = _samples(pipe, held_out, folder / "held-out", config.seed + 1_000_000, call)
    teacher = known_hash(transformer)
    for part in (samples, evaluated):
        if part.teacher != teacher:
            raise DistillationError(
                f"{part.folder} was made by other weights (hash {part.teacher[:12]}, the model's is {teacher[:12]}): "
                "collect samples anew, in another folder"
            )
    run = Distillation(pipe, transformer, patch, config, samples, evaluated, folder, steps)
    if config.flow_weight > 0:
        _ = run.flow  # refused here or not at all
    return run


def _samples(pipe: Any, source: Any, folder: Path, seed: int, call: dict[str, Any]) -> Samples:
    if isinstance(source, Samples):
        return source
    sizes = call.get("sizes")
    rest = {name: value for name, value in call.items() if name != "sizes"}
    return collect_prompts(pipe, list(source), folder, seed, sizes, rest, contents=False)


def _check_launch() -> None:
    """Raise DistillationError where `accelerate launch` is configured to shard the model over the processes."""
    asked = [name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if parse_flag_from_env(f"ACCELERATE_USE_{name}")]
    if asked:
        raise DistillationError(
            f"every process trains the whole model: {', '.join(asked)} is not supported, use a plain multi-GPU configuration of accelerate"
        )


def _check_together(transformer: Any, patch: Patch, config: DistillConfig) -> None:
    """Raise DistillationError for what can't be trained while processes share each sequence."""
    operators = operators_of(transformer).values()
    starts = any(part.starts for operator in operators for spec in operator.specs for part in spec.parts())
    if starts or (config.parameter_steps != 0 and any(list(operator.parameters()) for operator in operators)):
        raise DistillationError(
            "the first stage can't be run by processes that share a sequence: set parameter_steps=0, and fit the method's parameters in "
            "one process before, on smaller samples"
        )
    hooks = (getattr(transformer.get_submodule(name), "_diffusers_hook", None) for name in patch.originals)
    if config.attention_weight > 0 and any("cp_output" in name for hook in hooks for name in getattr(hook, "hooks", {})):
        raise DistillationError("attention is compared in parts, but diffusers gathers it layer by layer here: set attention_weight=0")


def _check_plain(transformer: Any, patch: Patch) -> None:
    """Raise DistillationError where the attention's weights are quantised."""
    holders = Holders(transformer)
    for name in projection_names(transformer, patch.originals):
        weight = holders.place(f"{name}.weight").tensor
        if not is_plain(weight):
            raise DistillationError(f"{name} is quantised ({type(weight).__name__}) and can't be trained: use train='lora'")


def _check_disjoint(source: Any, held_out: Any) -> None:
    """Raise DistillationError where training and evaluation share a prompt; each is Samples or prompts."""
    both_prompts = [[run.prompt for run in part.entries] if isinstance(part, Samples) else part for part in (source, held_out)]
    first, second = ({prompt for prompt in prompts if isinstance(prompt, str)} for prompts in both_prompts)
    if both := first & second:
        raise DistillationError(f"held-out prompts must not be trained on, but {sorted(both)[:3]} are: remove them from one side")


def _check_specs(transformer: Any, patch: Patch, config: DistillConfig) -> None:
    """Raise DistillationError unless every spec of the config can take the place of the pipeline's own."""
    assignment = patch.context.assignment
    own = assignment.spec
    if config.specs and own is None:
        raise DistillationError(f"specs take turns with one spec of the pipeline's own, which has {assignment}: leave them out")
    for operator in operators_of(transformer).values():
        for spec in config.specs:
            both = operator.params, joint_parameters((spec,), operator.layer)
            shapes = [{name: value.shape for name, value in parameters.state_dict().items()} for parameters in both]
            if own is None or shapes[0] != shapes[1] or (own.order, own.block) != (spec.order, spec.block):
                raise DistillationError(f"specs must have the parameters, order and blocks of the pipeline's {own}, which {spec} has not")


def _parameter_steps(transformer: Any, config: DistillConfig, folder: Path) -> int:
    """Steps of the first stage; unless they are asked for, none but where there is something, never trained, that it alone finds
    or finds best: what chooses blocks, or a projection."""
    operators = operators_of(transformer).values()
    if not any(list(operator.params.parameters()) for operator in operators):
        if config.parameter_steps:
            method = next(iter(operators)).context.assignment
            raise DistillationError(f"parameter_steps={config.parameter_steps} has nothing to fit: {method} has no parameters of its own")
        return 0
    if config.parameter_steps and not any(any(operator.fit.values()) for operator in operators):
        method = next(iter(operators)).context.assignment
        raise DistillationError(f"the parameters of {method} are trained in the second stage alone: leave parameter_steps out")
    if config.parameter_steps is not None:
        return config.parameter_steps
    begun = any(folder.glob("parameters-*"))  # continued on the pipeline that was interrupted
    asks = any(operator.solved or "choice" in operator.fit.values() for operator in operators)
    return PARAMETER_STEPS if asks and (begun or all(_fresh(operator) for operator in operators)) else 0


def _only_chooses(operator: AcceleratedAttention) -> bool:
    """Whether a layer's parameters are all those of patterns, which give no gradient."""
    sizes = operator.layer.heads, operator.layer.head_dim
    choosing = {name for spec in operator.specs for pattern in spec.keep for part in pattern.nested() for name in part.parameters(*sizes)}
    return all(name in choosing for name, _ in operator.params.named_parameters())


def fresh_tensors(operator: AcceleratedAttention) -> set[str]:
    """The names of a layer's tensors that have the values of an untrained method."""
    start = dict(joint_parameters(operator.specs, operator.layer).named_parameters())
    return {name for name, now in operator.params.named_parameters() if torch.equal(start[name].to(now.dtype), now.cpu())}


def _fresh(operator: AcceleratedAttention) -> bool:
    """Whether all of them have."""
    return len(fresh_tensors(operator)) == len(list(operator.params.parameters()))


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Raises an interrupt (Ctrl-C) of a short `with` block at its end.

    matplotlib works with callbacks of weak references, and Python drops what is raised in those (10 of 174 interrupts).
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():  # where Python raises nothing
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)
