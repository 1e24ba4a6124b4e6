"""A named backend that can't run here: refused before anything is changed where nothing can help, shown by `summary` where moving may."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from conftest import run, tiny_pipe

import dit_accel
from dit_accel import SLA, Fovea
from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch, xformers_rows


def of_width(head_dim: int) -> Any:
    """A FLUX transformer without weights worth the name, with one head."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=0, attention_head_dim=head_dim, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(head_dim - 8, 4, 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "module", "name", "value", "says"),
    [
        ("xformers", xformers_rows, "INSTALLED", False, r"'xformers' can't run this model: xformers is not installed: pip install"),
        ("triton", dispatch, "TRITON", False, "'triton' can't run this model: triton is not installed"),
        ("cpu", dispatch, "CPU_TARGET", "none", r"'cpu' can't run this model: .*C\+\+17 compiler"),
    ],
)
def test_a_backend_that_is_not_installed_is_refused(
    backend: str, module: Any, name: str, value: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    pipe = tiny_pipe()
    before, expected = dict(pipe.transformer.attn_processors), run(pipe, steps=1)
    with pytest.raises(BackendError, match=says):
        dit_accel.accelerate(pipe, Fovea(0.2), backend=backend)
    assert pipe.transformer.attn_processors == before
    assert not pipe.transformer._forward_hooks
    assert torch.equal(run(pipe, steps=1), expected)


@pytest.mark.parametrize(
    ("backend", "head_dim", "spec", "says"),
    [
        ("cpu", 12, Fovea(0.2), "head_dim of 8 to 256 in steps of 8, not 12"),
        ("triton", 12, Fovea(0.2), "not 12"),
        ("triton", 160, SLA(0.2), "linear rest up to head_dim 128, not 160"),
        ("xformers", 12, Fovea(0.2), "of 12"),
    ],
)
def test_heads_that_no_kernel_takes_are_refused(
    backend: str, head_dim: int, spec: dit_accel.AttentionSpec, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xformers_rows, "INSTALLED", True)
    monkeypatch.setattr(dispatch, "TRITON", True)
    model = of_width(head_dim)
    with pytest.raises(BackendError, match=says):
        dit_accel.accelerate(model, spec, backend=backend)
    dit_accel.accelerate(model, spec)  # "auto" finds what runs


@pytest.mark.parametrize("backend", ["triton", "xformers"])
def test_summary_shows_why_a_backend_cannot_run(backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model on the CPU that may be moved to a GPU later."""
    monkeypatch.setattr(xformers_rows, "INSTALLED", True)
    monkeypatch.setattr(dispatch, "TRITON", True)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    pipe = dit_accel.accelerate(tiny_pipe(), Fovea(0.2), backend=backend)
    rows = dit_accel.summary(pipe)
    assert {row.backend for row in rows} == {"none"}
    assert all("every call will raise BackendError" in row.why and "tensors are on cpu" in row.why for row in rows)
    shown = "".join(capsys.readouterr().out.split())
    assert "backend:none(everycallwillraiseBackendError:" in shown
    with pytest.raises(BackendError, match="tensors are on cpu"):
        run(pipe, steps=1)
    assert {row.backend for row in dit_accel.summary(pipe, show=False)} == {"none"}


def test_summary_needs_neither_device_nor_dtype_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered class may be a plain nn.Module."""
    pipe = dit_accel.accelerate(tiny_pipe(), Fovea(0.2))
    kind = type(pipe.transformer)
    for name in ("device", "dtype"):
        monkeypatch.setattr(kind, name, property(lambda self: nn.Module.__getattr__(self, "missing")))
    assert {row.backend for row in dit_accel.summary(pipe, show=False)} <= {"cpu", "reference"}


def test_summary_of_weights_offloaded_to_the_meta_device() -> None:
    """Sequential offload leaves no weight behind; the tokens' device counts, once a forward has shown it."""
    pipe = dit_accel.accelerate(tiny_pipe(), Fovea(0.2))
    chosen = {row.backend for row in dit_accel.summary(pipe, show=False)}
    run(pipe, steps=1)
    pipe.transformer.to("meta")
    rows = dit_accel.summary(pipe, show=False)
    assert {row.backend for row in rows} == chosen
