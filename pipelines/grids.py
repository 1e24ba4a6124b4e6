"""Where a family's forward tells its grid: in the shape of its latents, in position ids, or in plain numbers."""

import math
from typing import Any

import torch
from torch import Tensor

from dit_accel.pipelines.family import Arguments, Grid, Grids


def patch(transformer: Any) -> Grid:
    """Frames, rows and columns of latents in one token, from the transformer's configuration."""
    config = transformer.config
    size = config.patch_size if hasattr(config, "patch_size") else max(config.all_patch_size)  # Z-Image may have several
    sides = size if isinstance(size, tuple | list) else (size,) * 2
    return tuple(sides) if len(sides) == 3 else (getattr(config, "patch_size_t", None) or 1, *sides)


def _tokens(sizes: tuple[int, int, int], sides: Grid) -> Grids:
    return (tuple(-(-size // side) for size, side in zip(sizes, sides, strict=True)),)  # type: ignore[return-value]


def of_latents(arguments: Arguments, transformer: Any) -> Grids:
    """From latents `[B, C, H, W]` or `[B, C, T, H, W]`."""
    x: Tensor = arguments["hidden_states"]
    return _tokens((1, *x.shape[2:]) if x.ndim == 4 else tuple(x.shape[2:]), patch(transformer))  # type: ignore[arg-type]


def of_each_frame(arguments: Arguments, transformer: Any) -> Grids:
    """From latents `[B, C, T, H, W]` whose frames are attended one by one, as a batch."""
    return _tokens((1, *arguments["hidden_states"].shape[3:]), patch(transformer))


def of_frames_first(arguments: Arguments, transformer: Any) -> Grids:
    """From latents `[B, T, C, H, W]`."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    return _tokens((frames, height, width), patch(transformer))


def of_channels_last(arguments: Arguments, transformer: Any) -> Grids | str:
    """From latents `[B, T, H, W, C]`."""
    sparse = arguments.get("sparse_params")
    if sparse is not None and sparse.get("to_fractal"):
        return "tokens in blocks of the model's own sparse attention"
    return _tokens(tuple(arguments["hidden_states"].shape[1:4]), patch(transformer))


def of_image_list(arguments: Arguments, transformer: Any) -> Grids | str:
    """From a list of latents `[C, T, H, W]`, one per sample, all of one size."""
    images = arguments["x"]
    if any(not isinstance(x, Tensor) for x in images) or len({x.shape for x in images}) > 1:
        return "images of several sizes in one batch"
    side, frames = arguments.get("patch_size") or 2, arguments.get("f_patch_size") or 1
    return _tokens(tuple(images[0].shape[1:]), (frames, side, side))


def of_numbers(arguments: Arguments, transformer: Any) -> Grids | str:
    """From `num_frames`, `height` and `width` in tokens."""
    sizes = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if not all(isinstance(size, int) for size in sizes):
        return "no num_frames, height and width"
    return (sizes,)  # type: ignore[return-value]


def _of_samples(shapes: list[Any]) -> Grids | str:
    """From a list with, per sample, the (T, H, W) of its image or a list of those of its images."""
    samples = [[tuple(x) for x in (sample if isinstance(sample, list) else [sample])] for sample in shapes]
    if any(sample != samples[0] for sample in samples):
        return "images of several sizes in one batch"
    return tuple(samples[0])


def of_image_shapes(arguments: Arguments, transformer: Any) -> Grids | str:
    """From `img_shapes`: per sample, or for all, the (T, H, W) of each image."""
    return _of_samples(arguments["img_shapes"])


def of_shape_list(arguments: Arguments, transformer: Any) -> Grids | str:
    """From `shape_list`: per sample the (T, H, W) of each image, in rows that are padded to the longest."""
    grids = _of_samples(arguments["shape_list"])
    if not isinstance(grids, str) and sequence_length(grids) != arguments["hidden_states"].shape[1]:
        return "padding after the images"
    return grids


def of_items(arguments: Arguments, transformer: Any) -> Grids:
    """From latents `[B, C, T, H, W]`, or `[B, items, C, T, H, W]` with as many images, the drawn one first in the sequence."""
    shape = arguments["hidden_states"].shape
    return _tokens(tuple(shape[-3:]), patch(transformer)) * (shape[1] if len(shape) == 6 else 1)


def of_context_latents(arguments: Arguments, transformer: Any) -> Grids:
    """From latents `[B, C, H, W]` and a list of latents of other images, of any sizes."""
    images = [arguments["hidden_states"], *(arguments.get("context_latents") or [])]
    return tuple(_tokens((1, *x.shape[2:]), patch(transformer))[0] for x in images)


def from_ids(ids: Tensor) -> Grids | str:
    """The grids of images from position ids `[N, 3 or more]` or `[B, N, ...]`: (image, row, column, ...). Reads device memory."""
    ids = (ids[0] if ids.ndim == 3 else ids)[:, :3].cpu()
    ends = (ids[1:, 0] != ids[:-1, 0]).nonzero().flatten().add(1).tolist()
    grids = []
    for part in ids.tensor_split(ends):
        width = int((part[:, 1] == part[0, 1]).sum())
        index = torch.arange(len(part))
        # as the model made them: bfloat16 rounds ids above 256
        raster = torch.stack([index // width, index % width], dim=1)
        if len(part) % width or not torch.equal(part[:, 1:], (part[0, 1:].to(torch.int64) + raster).to(ids.dtype)):
            return "position ids that are not one raster of rows and columns after another"
        grids.append((1, len(part) // width, width))
    return tuple(grids)


def of_image_ids(arguments: Arguments, transformer: Any) -> Grids | str:
    """From `img_ids`."""
    return from_ids(arguments["img_ids"])


def of_image_ids_uncached(arguments: Arguments, transformer: Any) -> Grids | str:
    """From `img_ids`, unless the keys of reference images are kept from one step for the others: the output lacks their tokens then."""
    if arguments.get("kv_cache_mode") is not None:
        return "a cache of the reference images' keys"
    return from_ids(arguments["img_ids"])


def of_vision_tokens(arguments: Arguments, transformer: Any) -> Grids:
    """From `vision_token_shapes` of the images and videos that follow the text of a packed sequence."""
    return tuple(tuple(shape) for shape in arguments["vision_token_shapes"])


def of_condition_ids(arguments: Arguments, transformer: Any) -> Grids | str:
    """From `img_ids`, and `image_cond_ids` of further images."""
    grids: Grids = ()
    for ids in (arguments["img_ids"], arguments.get("image_cond_ids")):
        found = from_ids(ids) if ids is not None else ()
        if isinstance(found, str):
            return found
        grids += found
    return grids


def of_trailing_ids(arguments: Arguments, transformer: Any) -> Grids | str:
    """From the last `position_ids`, as many as there are image tokens."""
    ids: Tensor = arguments["position_ids"]
    return from_ids(ids[..., ids.shape[-2] - arguments["hidden_states"].shape[1] :, :])


def of_capacity(arguments: Arguments, transformer: Any) -> Grids | str:
    """From latents `[B, C, H, W]`; a grid that is not square is padded to the model's largest number of tokens."""
    if arguments.get("img_sizes") is not None:
        return "patches that were made outside of the transformer"
    return of_latents(arguments, transformer)


def text_of_packed(arguments: Arguments, transformer: Any) -> int:
    """Tokens of the text in front of a packed sequence."""
    return int(arguments["und_len"])


def history_of_framepack(arguments: Arguments, transformer: Any) -> int:
    """Tokens of the earlier frames, which are patched more coarsely the older they are."""
    total = 0
    for name, sides in (("latents_clean", (1, 2, 2)), ("latents_history_2x", (2, 4, 4)), ("latents_history_4x", (4, 8, 8))):
        frames, indices = arguments.get(name), arguments.get("indices_" + name)
        if frames is not None and indices is not None:
            total += sequence_length(_tokens(tuple(frames.shape[2:]), sides))
    return total


def sequence_length(grids: Grids) -> int:
    """Tokens of all images."""
    return sum(math.prod(grid) for grid in grids)
