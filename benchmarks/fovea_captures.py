"""Attention inputs that `fovea_forms.py` compares forms on: queries, keys and values of real and of random models, captured into files.

    python benchmarks/fovea_captures.py FOLDER [NAME ...]

One file for each name: `image-512`, `image-1024`, `image-2048` and `video-512` of the built-in models, `flux-64`, `wan-128` and the like of
tiny random transformers with heads of so many channels. A file is a list of (layer, grid, text tokens, text first, scale, q, k, v), the
last three `[H, N, D]`.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import dit_accel
from dit_accel.finetune.data.collect import Forward, collect
from dit_accel.measure.capture import Captured, capture_qkv
from dit_accel.measure.quality import spread
from dit_accel.pipelines.builtin_video import builtin_video_pipeline

TESTS = Path(__file__).parents[1] / "tests"
PROMPTS = ("a panda on a blue background", "a cat left of a cactus")
CLIP = "a panda moving left on a blue background"
LAYERS = {"image": (0, 2, 4, 5), "video": (0, 2, 4, 5), "random": (0, 1)}  # by their numbers in the forward


def image_forwards(size: int, prompts: int, levels: int) -> tuple[Any, list[Forward]]:
    """The built-in image model and recorded forwards of it, `levels` for each prompt."""
    pipe = dit_accel.builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": size, "width": size, "num_inference_steps": 2 * levels, "max_sequence_length": 32}
    with tempfile.TemporaryDirectory() as folder:
        return pipe, list(spread(collect(pipe, PROMPTS[:prompts], folder, **call), levels))


def video_forwards(levels: int = 2) -> tuple[Any, list[Forward]]:
    """The same of the built-in video model, 17 frames of 512 px."""
    pipe = builtin_video_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 512, "width": 512, "num_frames": 17, "num_inference_steps": 4, "max_sequence_length": 24, "guidance_scale": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        return pipe, list(spread(collect(pipe, [CLIP], folder, **call), levels))


def random_forwards(name: str, head_dim: int) -> tuple[Any, list[Forward]]:
    """A tiny random transformer of the tests with larger heads and larger weights, so that its logits spread, and one forward of it."""
    sys.path.insert(0, str(TESTS))
    import conftest
    import test_families

    tiny = test_families.Tiny(name)
    config = {**tiny.pipe.transformer.config, "attention_head_dim": head_dim}
    if name == "flux":
        config["axes_dims_rope"] = (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)
    if name == "sd3":
        config |= {"caption_projection_dim": 4 * head_dim, "pos_embed_max_size": 64}
    torch.manual_seed(0)
    transformer = type(tiny.pipe.transformer).from_config(config).eval()
    conftest.fill_randomly(transformer, scale=0.1)
    tiny.pipe.transformer = transformer
    size = {"flux": 128, "sd3": 128, "wan": 512}[name]
    if name == "wan":
        tiny.call |= {"num_frames": 1}
    from dit_accel.finetune.data.collect import Recorder
    from dit_accel.patch.anatomy import forward_names

    with Recorder(transformer, forward_names(transformer)) as recorder:
        tiny.run(height=size, width=size)
    arguments, prediction = recorder.forwards[0]
    return tiny.pipe, [Forward(arguments, prediction, prediction, name, 0, 0)]


def kept(captured: list[Captured], layers: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """What the file keeps of the captured layers with these numbers."""
    found = []
    for number in layers:
        c = captured[number]
        q, k, v = (x[0].float().clone() for x in (c.query, c.key, c.value))
        found.append((c.layer, c.layout.grid, c.layout.text, c.layout.text_first, c.scale, q, k, v))
    return found


def sources() -> dict[str, tuple[Callable[[], tuple[Any, list[Forward]]], tuple[int, ...]]]:
    """How each file's forwards are made, and which layers are kept."""
    found: dict[str, Any] = {
        "image-512": (lambda: image_forwards(512, 2, 2), LAYERS["image"]),
        "image-1024": (lambda: image_forwards(1024, 2, 2), LAYERS["image"]),
        "video-512": (video_forwards, LAYERS["video"]),
        "image-2048": (lambda: image_forwards(2048, 1, 1), LAYERS["image"]),
    }
    for name in ("flux", "wan", "sd3"):
        for head_dim in (64, 128):
            found[f"{name}-{head_dim}"] = (lambda name=name, head_dim=head_dim: random_forwards(name, head_dim), LAYERS["random"])
    return found


def main() -> None:
    folder, made = Path(sys.argv[1]), sources()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    for name in sys.argv[2:] or made:
        forwards, layers = made[name]
        pipe, recorded = forwards()
        items = [item for forward in recorded for item in kept(list(capture_qkv(pipe, forward)), layers)]
        torch.save(items, folder / f"{name}.part")
        (folder / f"{name}.part").rename(folder / f"{name}.pt")
        print(name, len(items), [tuple(item[5].shape) for item in items[:2]], items[0][:5], flush=True)


if __name__ == "__main__":
    main()
