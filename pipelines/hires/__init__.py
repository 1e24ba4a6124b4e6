"""High resolution by CLEAR's recipe (arXiv 2412.16112): a picture at the model's own size, then enlarged and drawn over in part.

The first stage is the original model at the base size. Each later one decodes the picture, enlarges it in pixels to about twice its side,
encodes it, mixes it with noise at the level where the last share `strength` of a schedule begins, and denoises it from there with the
pipeline's method (SDEdit, as CLEAR's release does it). All of that goes through the pipeline's own call, with `latents` and `sigmas`.
"""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, NotAcceleratedError, UnsupportedModelError
from dit_accel.files import check_folder
from dit_accel.parallel.decoding import shared_decoding, shares_tiles
from dit_accel.parallel.ranks import Ranks
from dit_accel.patch.anatomy import forward_names
from dit_accel.patch.modes import proportional
from dit_accel.patch.state import CONTEXT
from dit_accel.patch.verbs import dense
from dit_accel.patch.weights import weights_hash
from dit_accel.pipelines import family_of, token_pixels
from dit_accel.pipelines.hires import forecast as forecasting
from dit_accel.pipelines.hires import latents as forms
from dit_accel.pipelines.hires.recipe import Recipe, check_positions, plain, rotary_embedding, rotary_factor
from dit_accel.pipelines.hires.stages import Stages

if TYPE_CHECKING:
    from PIL.Image import Image

OURS = ("height", "width", "latents", "sigmas", "timesteps", "generator", "output_type", "num_images_per_prompt", "return_dict")
VERSION = 1


def generate_hires(
    pipe: Any,
    prompt: str | None = None,
    *,
    height: int,
    width: int,
    base: int = 1024,
    strength: float = 0.7,
    num_inference_steps: int = 20,
    seed: int = 0,
    ntk: float | None = None,
    proportional: bool = False,
    folder: str | Path | None = None,
    forecast: bool = True,
    **call: Any,
) -> "Image":
    """Draw one large picture in stages: the original attention at the base size, then the pipeline's method at each doubling.

    Args:
        pipe: a flow-matching image pipeline, accelerated or not; it is left as it was.
        prompt: None where `call` has embeddings.
        height: in pixels, a multiple of one token's side.
        width: the same.
        base: the first stage has no side above it, in pixels, to within one token.
        strength: share of the steps that each later stage draws again, in (0, 1].
        num_inference_steps: steps of the base picture; each later stage takes the last `strength` of as many.
        seed: of the base picture's noise, which is that of `torch.Generator().manual_seed(seed)`; later stages count up from it.
        ntk: factor of the rotary base above the base size; unless given 10 for FLUX, as in CLEAR's release, and 1 for the built-in
            model and other families.
        proportional: scale the logits of stages above the base size, as `trained_tokens` of `accelerate` does, with the base size's tokens.
        folder: finished stages are kept here, and the same call continues after them; without it, nothing is kept.
        forecast: print memory and time before anything is drawn, which takes two forwards at the base size.
        call: arguments of the pipeline's call.

    Raises before anything is drawn: UnsupportedModelError, NotAcceleratedError for proportional without a method, StageError where the
    folder contains stages of other settings or a damaged one, ValueError.
    """
    recipe = Recipe(height, width, base, strength, num_inference_steps, seed, ntk, proportional)
    transformer = forms.check_pipeline(pipe)
    if folder is not None and Ranks.of(getattr(transformer, "_parallel_config", None)) is not None:
        raise ArgumentError("stages can't be kept by processes that share a picture, as each would write them: leave the folder out")
    _check_call(pipe, prompt, call)
    unit = token_pixels(pipe, transformer)
    sizes = recipe.sizes(unit)
    check_positions(transformer, sizes[-1], unit)
    if folder is not None:
        check_folder(Path(folder))
    if prompt is not None:
        call = {"prompt": prompt, **call}
    drawing = _Drawing(pipe, transformer, recipe, sizes, call)
    stages = Stages(folder, drawing.settings() if folder is not None else {})
    done: list[Tensor] = []
    for number, size in enumerate(sizes):
        kept = stages.load(number, size)
        if kept is None:
            break
        done.append(kept)
    if forecast and len(done) < len(sizes):
        drawing.show_forecast(len(done))
    latents = done[-1] if done else None
    for number in range(len(done), len(sizes)):
        latents, record = drawing.draw(number, latents)
        stages.save(number, sizes[number], latents, record)
    with drawing.conditions(len(sizes) - 1):
        picture = forms.decode(pipe, latents, sizes[-1])  # type: ignore[arg-type]
    pipe.maybe_free_model_hooks()
    return pipe.image_processor.postprocess(picture, output_type="pil")[0]


def _check_call(pipe: Any, prompt: object, call: dict[str, Any]) -> None:
    """Raise ValueError for arguments that the pipeline's call does not take or that are not the user's to set."""
    names = set(inspect.signature(type(pipe).__call__).parameters) - {"self"}
    unknown = sorted(set(call) - names)
    if unknown:
        raise ArgumentError(f"{type(pipe).__name__}'s call takes no {', '.join(unknown)}: leave it out")
    taken = sorted(set(call) & set(OURS))
    if taken:
        raise ArgumentError(f"generate_hires sets {', '.join(taken)} itself: leave it out")
    if prompt is not None and not isinstance(prompt, str):
        raise ArgumentError(f"prompt must be one text or None, not {prompt!r}")


class _Drawing:
    """One picture: the pipeline, what was asked for, and the sizes of its stages."""

    def __init__(self, pipe: Any, transformer: Any, recipe: Recipe, sizes: list[tuple[int, int]], call: dict[str, Any]) -> None:
        """Raises UnsupportedModelError or NotAcceleratedError where the recipe and the pipeline don't fit."""
        self.pipe, self.transformer, self.recipe, self.sizes, self.call = pipe, transformer, recipe, sizes, call
        self.factor = rotary_factor(transformer, recipe.ntk)
        self.unit = token_pixels(pipe, transformer)
        patch = getattr(transformer, CONTEXT, None)
        self.context = None if patch is None else patch.context
        if recipe.proportional and self.context is None:
            raise NotAcceleratedError("proportional requires an accelerated pipeline: call accelerate(pipe) first")
        self._check_first_forward()

    def _check_first_forward(self) -> None:
        """Start the pipeline at the base size and leave it before its first forward: what that is called with tells the rest."""
        self.args, self.kwargs = forms.first_forward(self.pipe, self.transformer, self._call(0))
        arguments = dict(zip(forward_names(self.transformer), self.args, strict=False)) | self.kwargs
        family: Any = family_of(self.transformer)
        first = arguments[family.latents]
        first = first if isinstance(first, Tensor) else first[0][None]
        self.batch = first.shape[0]
        expected = forms.latent_shape(self.pipe, self.sizes[0])
        if first[0].numel() != expected[1] * expected[2] * expected[3]:
            raise UnsupportedModelError(
                f"high resolution requires latents of {expected} at the base size, {type(self.pipe).__name__} has {tuple(first.shape)}"
            )
        self.text = family.text(arguments) if family.text else None
        if self.recipe.proportional and self.text is None:
            raise UnsupportedModelError(f"proportional requires a family whose text length is known, not {family.name!r}")

    def _call(self, number: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for a stage, but for its noise."""
        height, width = self.sizes[number]
        steps = self.recipe.num_inference_steps
        call = {**self.call, "height": height, "width": width, "num_inference_steps": steps}
        if number:
            call["sigmas"] = forms.partial_sigmas(steps, self.recipe.strength)
            call["num_inference_steps"] = len(call["sigmas"])
        return call

    def settings(self) -> dict[str, Any]:
        """All that the picture depends on, JSON-ready."""
        context = self.context
        return {
            "version": VERSION,
            **self.recipe.to_dict(),
            "ntk": self.factor,
            "call": plain(self.call),
            "pipeline": type(self.pipe).__name__,
            "scheduler": {k: plain(v) for k, v in dict(self.pipe.scheduler.config).items() if not k.startswith("_")},
            "weights": _hash(self.transformer),
            "autoencoder": _hash(self.pipe.vae),
            "method": None if context is None else context.assignment.record(),
            "dense_steps": 0 if context is None else context.assignment.dense_steps,
            "trained_tokens": None if context is None else context.trained_tokens,
        }

    def show_forecast(self, finished: int) -> None:
        """Print what the stages after the finished ones will take."""
        shape = forecasting.Shape.of(self.transformer, self.unit, self.text or 0)
        with dense(self.pipe) if self.context else contextlib.nullcontext():
            timed = forecasting.timed_forward(self.transformer, self.args, self.kwargs)
        self.pipe.maybe_free_model_hooks()  # an offloaded pipeline finds the device free again
        stages = []
        for number in range(finished, len(self.sizes)):
            call = self._call(number)
            method = self.context.assignment if number and self.context else None
            noise = tuple(call.get("sigmas", [1.0] * call["num_inference_steps"]))  # of the first stage no method asks
            stages.append(forecasting.Stage(self.sizes[number], noise, method))
        tile = getattr(self.pipe.vae, "tile_sample_min_size", None) if _tiles(self.pipe.vae) else None
        forecasting.show(self.pipe, self.transformer, shape, timed, self.sizes[0], stages, tile, self.batch)

    def draw(self, number: int, before: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """Final latents of a stage from those of the one before, and a record of it."""
        call = self._call(number)
        seed = self.recipe.seed + number
        record: dict[str, Any] = {"seed": seed, "steps": call["num_inference_steps"], "sigma": 1.0}
        with self.conditions(number):
            if before is not None:
                picture = forms.enlarged(forms.decode(self.pipe, before, self.sizes[number - 1]), self.sizes[number])
                start = forms.encode(self.pipe, picture)
                forms.first_forward(self.pipe, self.transformer, call)  # the scheduler at this size, as the pipeline sets it
                record["sigma"] = float(self.pipe.scheduler.sigmas[0])
                call["latents"] = forms.noised(self.pipe, start, record["sigma"], seed)
            generator = torch.Generator().manual_seed(seed)
            latents: Tensor = self.pipe(**call, generator=generator, output_type="latent", return_dict=False)[0]
        return latents, record

    @contextlib.contextmanager
    def conditions(self, number: int) -> Iterator[None]:
        """The pipeline as a stage requires it; then as it was, whatever happens."""
        pipe, (height, width) = self.pipe, self.sizes[number]
        scheduler = pipe.scheduler
        with contextlib.ExitStack() as stack:
            if number == 0:
                stack.enter_context(dense(pipe) if self.context else contextlib.nullcontext())
            else:
                stack.enter_context(_rescaled(self.transformer, self.factor))
                stack.enter_context(_tiled(pipe.vae))
                stack.enter_context(shared_decoding(pipe) if shares_tiles(pipe.vae) else contextlib.nullcontext())
                pipe.scheduler = forms.scheduler_for(scheduler, height * width // self.unit**2)
            if number and self.recipe.proportional:
                first = self.sizes[0][0] * self.sizes[0][1] // self.unit**2
                stack.enter_context(proportional(pipe, first + (self.text or 0)))
            try:
                yield
            finally:
                pipe.scheduler = scheduler


def _hash(model: Any) -> str:
    """SHA-256 of a model's weights. Raises ValueError where offloading keeps them away."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ArgumentError(
            f"a folder for stages requires weights that can be read, but {type(model).__name__} is offloaded: leave the folder out"
        )
    return weights_hash(model)


@contextlib.contextmanager
def _rescaled(transformer: Any, factor: float) -> Iterator[None]:
    """The rotary base times a factor, where it is not 1."""
    if factor == 1:
        yield
        return
    embedding = rotary_embedding(transformer)
    before = embedding.theta
    embedding.theta = before * factor
    try:
        yield
    finally:
        embedding.theta = before


def _tiles(vae: Any) -> bool:
    """Whether an autoencoder can work in tiles."""
    return hasattr(vae, "enable_tiling") and hasattr(vae, "use_tiling")


@contextlib.contextmanager
def _tiled(vae: Any) -> Iterator[None]:
    """An autoencoder in tiles, where it can."""
    if not _tiles(vae):
        yield
        return
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
