"""What "auto" takes on a GPU, by stand-ins for cards that are not here: which are refused, and what a user reads."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import forward_arguments, tiny_transformer

from dit_accel.kernels import dispatch, xformers_rows
from dit_accel.method.presets import Fovea
from dit_accel.patch.verbs import accelerate

CARD = torch.device("cuda", 0)


def amd(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """An AMD card, as PyTorch for ROCm shows it."""
    monkeypatch.setattr(dispatch, "TRITON", True)
    monkeypatch.setattr(torch.version, "hip", "7.2.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=architecture))


def nvidia(monkeypatch: pytest.MonkeyPatch, *, triton: bool = True, xformers: bool = False) -> None:
    """A card of compute capability 9.0 with these packages."""
    monkeypatch.setattr(dispatch, "TRITON", triton)
    monkeypatch.setattr(xformers_rows, "INSTALLED", xformers)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))


@pytest.mark.parametrize("architecture", ["gfx942", "gfx942:sramecc+:xnack-"])
def test_the_amd_architecture_of_the_table_is_taken(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    amd(monkeypatch, architecture)
    assert dispatch.choose("auto", CARD, torch.bfloat16, 128) == ("triton", "fused kernels")
    assert "head_dim of 8 to 256" in str(dispatch.triton_refusal(CARD, torch.bfloat16, 36))


@pytest.mark.parametrize("architecture", ["gfx90a:sramecc+", "gfx950", "gfx1100", "gfx1201", ""])
def test_other_amd_architectures_are_refused_by_name(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    amd(monkeypatch, architecture)
    name = architecture.split(":")[0]
    assert dispatch.triton_refusal(CARD, torch.bfloat16, 128) == (
        f"of AMD's GPUs the Triton kernels are compiled and checked for gfx942 (MI300, MI325) alone, not for {name}"
    )
    assert dispatch.choose("auto", CARD, torch.float64, 128)[0] == "reference"


def test_a_gpu_with_kernels_or_xformers_is_nothing_to_tell_of(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia(monkeypatch)
    assert dispatch.slow_on_gpu(CARD, torch.bfloat16, 64, linear=False) is None
    assert dispatch.slow_on_gpu(torch.device("cpu"), torch.float64, 64, linear=False) is None
    nvidia(monkeypatch, triton=False, xformers=True)
    assert dispatch.slow_on_gpu(CARD, torch.bfloat16, 64, linear=False) is None


def test_a_gpu_left_with_the_reference_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia(monkeypatch, triton=False)
    assert dispatch.slow_on_gpu(CARD, torch.bfloat16, 64, linear=False) == (
        "the slow eager reference runs on cuda:0, because triton is not installed: install triton (pip install triton) "
        "or xformers (pip install dit-accel[xformers])"
    )
    nvidia(monkeypatch)
    reason = str(dispatch.slow_on_gpu(CARD, torch.bfloat16, 256, linear=True))
    assert reason == "the slow eager reference runs on cuda:0, because the Triton kernels take a linear rest up to head_dim 128, not 256"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_model_on_such_a_gpu_says_so_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(dispatch, "slow_on_gpu", lambda *given, linear: asked.append((*given, linear)) or "install triton")
    model = accelerate(tiny_transformer(double=1, single=0), Fovea(0.5), backend=backend)
    with warnings.catch_warnings(record=True) as reason, torch.no_grad():
        warnings.simplefilter("always")
        for side in (4, 5):  # every size is a call of its own
            model(**forward_arguments(side, 6))
    assert [str(one.message) for one in reason] == (["dit_accel: install triton"] if backend == "auto" else [])
    assert asked == ([(torch.device("cpu"), torch.float32, 16, False)] * 2 if backend == "auto" else [])
