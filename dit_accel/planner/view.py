"""`view_attention`: what an accelerated pipeline keeps of its attention while it draws, as one HTML page to click through."""

import contextlib
import dataclasses
import fnmatch
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, FallbackError
from dit_accel.files import check_folder, write_text
from dit_accel.finetune.moments import recorded_moments
from dit_accel.measure.capture import Captured
from dit_accel.measure.evaluation import check_call, component_names, draw
from dit_accel.method.assignment import Moment
from dit_accel.method.checks import is_int, is_real, require
from dit_accel.method.parts import TopK
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.anatomy import forward_names
from dit_accel.patch.modes import always, running
from dit_accel.patch.processor import AcceleratedAttention
from dit_accel.patch.state import Patch, patches_of
from dit_accel.planner.kept import Head, Place, looked_at
from dit_accel.planner.text_tokens import labels_of_text
from dit_accel.planner.view_page import about_bytes, view_page

MEGABYTES = 8.0  # of a page, at most, unless more are asked for
EVERYWHERE = AttentionSpec((TopK(1.0),))  # brings every layer's call to its operator, whatever the layer runs
SEEDS = 2**64  # of torch's generators
STEPS = "num_inference_steps"


def _megabytes(count: float) -> str:
    """Bytes as millions, small ones to two digits."""
    return f"{count / 1e6:.2g}" if count < 1e7 else f"{count / 1e6:.0f}"


@dataclass
class Watched:
    """What is asked for, and what of it was seen. `layers`: the names that users are shown; `limit`: bytes of the page."""

    layers: tuple[str, ...]
    heads: tuple[int, ...]
    steps: tuple[int, ...]
    limit: float
    found: list[Head] = field(default_factory=list)
    last_step: int = -1
    checked: bool = False

    def check_size(self, layout: TokenLayout, head_dim: int) -> None:
        """Raise ArgumentError at the first call where the page would be too large."""
        count = len(self.layers) * len(self.heads) * len(self.steps)
        about = count * about_bytes(layout, head_dim)
        if not self.checked and about > self.limit:
            raise ArgumentError(
                f"the page would have about {_megabytes(about)} MB with {count} views of {layout.image} tokens, and "
                f"{self.limit / 1e6:g} MB is the most: ask for fewer layers, heads or steps, a smaller size, or raise the limit "
                "(megabytes=, --megabytes)"
            )
        self.checked = True


@dataclass
class Batch:
    """The samples of the forward that runs: one, or with guidance in a batch the one with the prompt and others.

    `prompt_first`: see `Family`. `perturbed`: the last sample repeats the one with the prompt, and some layers perturb it. `packed`: items
    of one sequence, perhaps. `rows`: how many each layer has had in its calls so far.
    """

    prompt_first: bool
    samples: int = 1
    perturbed: bool = False
    packed: bool = False
    rows: Counter[str] = field(default_factory=Counter)

    def place(self, layer: str, rows: int) -> slice | None:
        """Of the sample with the prompt in a layer's call with so many rows, or None where it has other samples, as where each is computed
        by itself. Where the rows are frames, the middle one's, whose picture is shown."""
        before, samples = self.rows[layer], 1 if self.packed and rows == 1 else self.samples
        self.rows[layer] += rows
        each = max(1, rows // samples)
        sample = 0 if self.prompt_first else samples - (2 if self.perturbed else 1)
        row = sample * each + each // 2 - before
        return slice(row, row + 1) if 0 <= row < rows else None


def view_attention(
    pipe: Any, prompt: str, out: str | Path = "view.html", *, layers: int | str | Sequence[int | str] | None = None,
    heads: int | Sequence[int] = 0, steps: int | Sequence[int] | None = None, seed: int = 0, megabytes: float = MEGABYTES, **call: Any,
) -> Path:  # fmt: skip
    """Draw a prompt with an accelerated pipeline and write a page that shows, for each token clicked, what the method keeps.

    Args:
        pipe: after `accelerate` or `load_adapter`; its method runs in every step that its assignment says, even where it is slower.
        prompt: what to draw.
        out: the page's file.
        layers: numbers of accelerated attention modules, their names, or patterns of names; the middle one unless given.
        heads: their numbers in these layers, from 0.
        steps: numbers of denoising steps, from 0; the middle one unless given.
        seed: of the noise.
        megabytes: the largest page that is written.
        call: arguments of the pipeline's call: height, width, num_inference_steps and the like, the `image` of a model that edits one.

    Shown are queries and keys as the layer has them in that step of this very run. Guidance makes two passes or a batch of two: the pass
    with the prompt is shown. The page is one file, which loads nothing. Returns its path.
    Raises ValueError, or a class of dit_accel.errors, where there is no such layer, head or step or the page would be too large, and
    FallbackError where a layer's calls can't be accelerated. Nothing is written then, and the pipeline is as it was.
    """
    check_call(pipe, [prompt], call)
    _check_values(seed, megabytes, call)
    operators = _operators(pipe)
    names = _chosen_layers(layers, list(operators))
    watched = Watched(names, _numbers("heads", heads), _chosen_steps(pipe, steps, call), megabytes * 1e6)
    _check_heads(watched, operators)
    out = _checked_path(out)
    with always(pipe), _watching(pipe, watched), torch.compiler.set_stance("force_eager"):  # graphs do not call the operators' modules
        pictures = draw(pipe, prompt, seed, call)
    _check_found(pipe, watched)
    text = watched.found[0].captured.layout.text
    facts = {"pipeline": type(pipe).__name__, "prompt": prompt, "seed": seed, "call": _plain(call)}
    page = view_page(watched.found, pictures, labels_of_text(pipe, prompt, text, call), facts)
    if len(page) > watched.limit:
        raise ArgumentError(f"the page has {_megabytes(len(page))} MB, and {megabytes:g} is the most: ask for fewer layers, heads or steps")
    write_text(out, page)
    return out


def _check_values(seed: int, megabytes: float, call: dict[str, Any]) -> None:
    """Raise ArgumentError unless they are what `view_attention` takes."""
    require(is_int(seed) and 0 <= seed < SEEDS, "seed must be an int from 0 to 2**64 - 1", seed)
    require(is_real(megabytes) and megabytes > 0, "megabytes must be a number > 0", megabytes)
    for name in fnmatch.filter(call, "num_*_per_prompt"):
        require(call[name] == 1, f"{name} must be 1", call[name], "the page shows one picture or video, and its attention")


def _checked_path(out: str | Path) -> Path:
    """Raise ArgumentError unless a file can be written there. Its folder is made if need be."""
    require(isinstance(out, str | Path), "out must be the name of a file", out)
    path = Path(out)
    if path.is_dir():
        raise ArgumentError(f"out must name a file, not the folder {path}")
    check_folder(path.parent)
    return path


def _plain(call: dict[str, Any]) -> dict[str, Any]:
    """What of a call a page can say: no pictures."""
    return {name: value for name, value in call.items() if isinstance(value, str | int | float)}


def _operators(pipe: Any) -> dict[str, AcceleratedAttention]:
    """Those of all transformers by the names that users are shown."""
    found: dict[str, AcceleratedAttention] = {}
    for prefix, (model, patch) in zip(component_names(pipe), patches_of(pipe), strict=True):
        found |= {prefix + name: model.get_submodule(name).dit_accel for name in patch.originals}
    return found


def _numbers(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """One number or several, each once, ascending. Raises ArgumentError for anything else."""
    given = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, Iterable) else ()
    if not given or not all(is_int(number) and number >= 0 for number in given):
        raise ArgumentError(f"{name} must be one or more numbers >= 0, not {value!r}")
    return tuple(sorted(set(given)))


def _chosen_layers(layers: int | str | Sequence[int | str] | None, names: list[str]) -> tuple[str, ...]:
    require(layers is None or isinstance(layers, int | str | Iterable), "layers must be one or more numbers or names", layers)
    given = [len(names) // 2] if layers is None else [layers] if isinstance(layers, int | str) else list(layers)
    found: set[str] = set()
    for one in given:
        own = [name for number, name in enumerate(names) if (one == number if is_int(one) else fnmatch.fnmatchcase(name, str(one)))]
        if not own:
            known = ", ".join(f"{number} {name}" for number, name in enumerate(names))
            raise ArgumentError(f"no accelerated layer is {one!r}: name some of {known}")
        found.update(own)
    if not found:
        raise ArgumentError("layers must be one or more numbers or names, not an empty list")
    return tuple(name for name in names if name in found)


def _chosen_steps(pipe: Any, steps: int | Sequence[int] | None, call: dict[str, Any]) -> tuple[int, ...]:
    parameter = inspect.signature(type(pipe).__call__).parameters.get(STEPS)
    given = call.get(STEPS, None if parameter is None else parameter.default)
    count = given if isinstance(given, int) else None
    if steps is None:
        return (0 if count is None else count // 2,)
    found = _numbers("steps", steps)
    if count is not None and found[-1] >= count:
        raise ArgumentError(f"the run has {count} steps, numbered from 0, and no step {found[-1]}")
    return found


def _check_heads(watched: Watched, operators: dict[str, AcceleratedAttention]) -> None:
    for name in watched.layers:
        if watched.heads[-1] >= operators[name].heads:
            raise ArgumentError(f"{name} has {operators[name].heads} heads, numbered from 0, and no head {watched.heads[-1]}")


def _check_found(pipe: Any, watched: Watched) -> None:
    """Raise unless every layer and step that was asked for was seen."""
    seen = {head.layer for head in watched.found}, {head.step for head in watched.found}
    if missing := [name for name in watched.layers if name not in seen[0]]:
        reasons = [reason for _, patch in patches_of(pipe) for reason in patch.context.fallbacks]
        why = f"its calls have {', '.join(reasons)}" if reasons else "it does not run in the steps that were asked for"
        raise FallbackError(f"nothing was seen of {missing[0]}: {why}")
    if missing_steps := [step for step in watched.steps if step not in seen[1]]:
        raise ArgumentError(f"the run has {watched.last_step + 1} steps, numbered from 0, and no step {missing_steps[0]}")


@contextlib.contextmanager
def _watching(pipe: Any, watched: Watched) -> Iterator[None]:
    """Every layer's calls pass by `watched` for the length of a `with` block, those of the original attention as well."""
    models, changed = patches_of(pipe), []
    with recorded_moments([model for model, _ in models]) as moments, _counted(pipe, models) as batches:
        try:
            for prefix, (model, patch), own, batch in zip(component_names(pipe), models, moments, batches, strict=True):
                for name in patch.originals:
                    operator = model.get_submodule(name).dit_accel
                    operator.attend = _seeing(prefix + name, operator, patch, own, batch, watched)
                    changed.append(operator)
            with running(pipe, EVERYWHERE):
                yield
        finally:
            for operator in changed:
                vars(operator).pop("attend", None)


@contextlib.contextmanager
def _counted(pipe: Any, models: Sequence[tuple[Any, Patch]]) -> Iterator[list[Batch]]:
    """The batch of each model's forward that runs, for the length of a `with` block."""
    perturbed, hooks, found = bool(getattr(type(pipe), "do_perturbed_attention_guidance", False)), [], []

    def counting(batch: Batch, names: list[str], latents: str) -> Callable[..., None]:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (dict(zip(names, args, strict=False)) | kwargs)[latents]
            batch.samples, batch.packed = len(given), isinstance(given, list | tuple)
            batch.perturbed = perturbed and pipe.do_perturbed_attention_guidance
            batch.rows.clear()

        return before

    try:
        for model, patch in models:
            family = patch.context.family
            found.append(Batch(family.prompt_first))
            hook = counting(found[-1], forward_names(model), family.latents)
            hooks.append(model.register_forward_pre_hook(hook, with_kwargs=True))
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def _seeing(
    name: str, operator: AcceleratedAttention, patch: Patch, moments: list[Moment], batch: Batch, watched: Watched
) -> Callable[..., Tensor]:
    """The layer's own `attend`, by the assignment that it has now, which looks at the calls that were asked for."""
    assignment, attend = patch.context.assignment, type(operator).attend

    def seeing(
        query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float | None, bias: Tensor | None, forward: Any
    ) -> Tensor:
        moment = moments[-1]
        watched.last_step = max(watched.last_step, moment.step)
        watched.check_size(layout, query.shape[-1])
        forward = dataclasses.replace(forward, rules=assignment.at(moment, forward.image))
        known = any((head.layer, head.step) == (name, moment.step) for head in watched.found)  # guidance passes again
        own = batch.place(name, len(query))
        if name in watched.layers and moment.step in watched.steps and not known and own is not None:
            scaled = forward.scaled(scale, key.shape[2], query.shape[3])
            captured = Captured(query[own], key[own], value[own], layout, name, scaled, None if bias is None else bias[own])
            place, values = Place(name, operator.layer, moment.step, moment.noise), operator.params(query.device)
            watched.found += looked_at(place, captured, forward.groups(operator.layer), values, watched.heads, patch.context.backend)
        return attend(operator, query, key, value, layout, scale, bias, forward)

    return seeing
