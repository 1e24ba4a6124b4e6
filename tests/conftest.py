"""Tiny random FLUX pipelines made without any download, and the way to run them."""

import base64
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it at import
os.environ["DIT_ACCEL_GUARD"] = "off"  # tiny models are faster without acceleration: unless a test is about that, the method runs

import pytest
import torch
import torch.nn as nn
from matrix import pytest_addoption, pytest_configure, pytest_runtest_makereport, pytest_sessionfinish, pytest_sessionstart
from quick_interpreter import make_quick
from torch import Tensor

__all__ = [
    "pytest_addoption",
    "pytest_configure",
    "pytest_runtest_makereport",
    "pytest_sessionfinish",
    "pytest_sessionstart",
]  # hooks of every run

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other. What is about threads sets their number
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton and dit_accel's dispatch read it at import

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*.py"]

TEXT, WIDTH, POOLED, CHANNELS = 12, 32, 24, 16
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")  # a PNG
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# no sandbox: it does not work for root, and the pages are our own
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
LAYERS = 4  # attention modules of a tiny transformer


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill_randomly(module: nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Add noise to every parameter, so that none stays at zero or at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def tiny_transformer(seed: int = 0, double: int = 2, single: int = 2, heads: int = 2) -> Any:
    """A random FLUX transformer with heads of 16."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=CHANNELS, num_layers=double, num_single_layers=single, attention_head_dim=16, num_attention_heads=heads,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill_randomly(transformer, seed)
    return transformer.eval()


def tiny_pipe(seed: int = 0) -> Any:
    """A FLUX pipeline around `tiny_transformer`, without autoencoder and text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler()
    nothing = {"vae": None, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipe = FluxPipeline(scheduler=scheduler, transformer=tiny_transformer(seed), **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, height: int = 272, width: int = 400, *, steps: int = 2, batch: int = 1, seed: int = 0, **call: Any) -> Tensor:
    """The packed latents that a tiny pipeline draws from fixed noise and text."""
    dtype = pipe.transformer.dtype
    images = pipe(
        prompt_embeds=normal(batch, TEXT, WIDTH, seed=seed + 1).to(dtype),
        pooled_prompt_embeds=normal(batch, POOLED, seed=seed + 2).to(dtype),
        generator=torch.Generator().manual_seed(seed), height=height, width=width, num_inference_steps=steps, output_type="latent", **call,
    ).images  # fmt: skip
    assert bool(images.isfinite().all()), "the pipeline drew NaN or infinity"
    return images


def position_ids(height: int, width: int, image: int = 0) -> Tensor:
    """FLUX's `[N, 3]` ids (image, row, column) of a raster of tokens."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], dim=-1).reshape(-1, 3).float()


def forward_arguments(height: int = 17, width: int = 25, *, batch: int = 1, time: float = 0.7, seed: int = 0) -> dict[str, Any]:
    """Arguments of one forward of a tiny transformer on a grid of tokens."""
    return {
        "hidden_states": normal(batch, height * width, CHANNELS, seed=seed),
        "encoder_hidden_states": normal(batch, TEXT, WIDTH, seed=seed + 1),
        "pooled_projections": normal(batch, POOLED, seed=seed + 2),
        "timestep": torch.full((batch,), time),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": position_ids(height, width),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; infinity where there is NaN."""
    assert got.shape == expected.shape, f"got {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    error = float((got - expected).norm() / expected.norm())
    return error if error == error else float("inf")


@pytest.fixture(autouse=True)
def _tensor_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with a card's float32 errs as its tensor cores do."""
    if "gpu" in request.keywords and torch.cuda.is_available() and not torch.version.hip:
        import on_device  # it imports dit_accel, which reads the environment that is set above

        monkeypatch.setattr(on_device, "tensor_cores", True)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield patch


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="requires playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("requires Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def pipe() -> Any:
    """A tiny FLUX pipeline with 2 double and 2 single blocks."""
    return tiny_pipe()


@pytest.fixture
def sparse_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grows by the query's shape at every call of an accelerated operator."""
    from dit_accel.patch import processor

    calls: list[tuple[int, ...]] = []
    original: Callable[..., Any] = processor.attend

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(processor, "attend", counted)
    return calls


@pytest.fixture
def numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations write no page: drawing its plots takes longer than tiny models do."""
    from dit_accel.measure import evaluation

    monkeypatch.setattr(evaluation, "write_page", lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def drawn_curves() -> Iterator[Any]:
    """Trainings write a curve of one pixel: to draw it takes longer than tiny models learn. Gives what draws it, for tests about it."""
    runs = sys.modules.get("dit_accel.finetune.session")  # what no module imports need not be imported
    if runs is None:
        yield None
        return
    original = runs.draw_curve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "draw_curve", lambda history: PIXEL)
        yield original


@pytest.fixture(autouse=True)
def _records() -> None:
    """On a card calls are recorded: what a test changes of how they are made must show."""
    if calls := sys.modules.get("dit_accel.kernels.triton.calls"):
        calls._records.clear()


@pytest.fixture(autouse=True)
def _guard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard as users have it, in a cache folder of the test's own, for what is marked so."""
    if "crossover" in request.keywords:
        from dit_accel.kernels.cpu import native
        from dit_accel.operator import decisions, guard

        native.BFLOAT16.target()  # chosen while nothing is measured: every process of the tests runs the same code

        monkeypatch.delenv(decisions.VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(guard, "_known", {})
