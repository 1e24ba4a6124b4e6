"""What a distillation takes of the machine: it reads no cache to start, keeps no output it is done with, sends no message without bound."""

import copy
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_fixtures import CALL, PROMPTS, learn, prompt_pipe, student
from torch import nn

from dit_accel import dense
from dit_accel.errors import DistillationError
from dit_accel.finetune import processes
from dit_accel.finetune import session as runs
from dit_accel.finetune.capture import _RelativeError, capture, compared
from dit_accel.finetune.data import record
from dit_accel.finetune.data.collect import collect
from dit_accel.finetune.losses import relative_error
from dit_accel.finetune.velocity import predict

# Samples


def test_samples_that_are_there_are_not_read_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(student("lora"), tmp_path / "run", train="lora", steps=1)
    read: list[Any] = []
    real = record.checksum
    monkeypatch.setattr(record, "checksum", lambda tensor: read.append(tensor) or real(tensor))
    monkeypatch.setattr(runs, "known_hash", lambda _: pytest.fail(f"{len(read)} tensors were read") if read else "other weights")
    with pytest.raises(DistillationError, match="was made by other weights"):
        learn(student("lora"), tmp_path / "run", train="lora", steps=1)


def test_a_file_that_was_cut_off_is_made_again_and_a_damaged_one_is_named_when_it_is_read(tmp_path: Path) -> None:
    learn(student("lora"), tmp_path / "run", train="lora", steps=1)
    shutil.rmtree(tmp_path / "run" / "checkpoint-0000001")
    paths = sorted((tmp_path / "run" / "samples").glob("run-*"))
    whole = {path: path.read_bytes() for path in paths}
    paths[0].write_bytes(whole[paths[0]][:-1])
    for path in paths[1:]:
        path.write_bytes(whole[path][:-1] + bytes([whole[path][-1] ^ 1]))
    with pytest.raises(DistillationError, match=f"{paths[1].name} is a damaged sample: .*; delete it or collect again") as raised:
        learn(student("lora"), tmp_path / "run", train="lora", steps=40, checkpoint_every=50, learning_rate=1e-6)
    assert paths[0].read_bytes() == whole[paths[0]]
    assert "another checksum" in str(raised.value)
    collect(prompt_pipe(), PROMPTS[:2], tmp_path / "run" / "samples", **CALL)  # reads them all
    assert {path: path.read_bytes() for path in paths} == whole


# Attention outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_and_its_gradient_are_the_formulas(dtype: torch.dtype) -> None:
    value, target = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    first, second = value.clone().requires_grad_(), value.clone().requires_grad_()
    expected, got = relative_error(first, target), _RelativeError.apply(second, target)
    (expected * 0.3).backward()
    (got * 0.3).backward()
    assert torch.equal(got, expected)
    assert second.grad is not None
    torch.testing.assert_close(second.grad, first.grad, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert float(second.grad.abs().max()) > 0


def test_a_teachers_output_is_let_go_of_when_it_was_compared(tmp_path: Path) -> None:
    pipe = student("lora")
    arguments = collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)[0].arguments
    with torch.no_grad(), dense(pipe), capture(pipe) as taught:
        predict(pipe.transformer, arguments)
    kept = copy.deepcopy(taught)
    references = [weakref.ref(output) for outputs in taught.values() for output in outputs]
    left: list[int] = []
    for name in taught:
        module = pipe.transformer.get_submodule(name)
        module.register_forward_pre_hook(lambda *_: left.append(sum(reference() is not None for reference in references)))
    with capture(pipe) as learnt, compared(pipe, taught) as errors:
        prediction = predict(pipe.transformer, arguments)
    assert prediction.requires_grad
    assert left == [len(references) - i for i in range(len(references))]
    assert [reference() for reference in references] == [None] * len(references)
    expected = [relative_error(learnt[name][0], kept[name][0]) for name in kept]
    assert [float(error) for error in errors] == [float(error) for error in expected]
    assert min(map(float, errors)) > 0


@pytest.mark.parametrize("train", ["lora", "attention"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, train: str) -> None:
    """Its repeated forwards have no teacher to be compared with."""
    results = [
        learn(student(train), tmp_path / str(again), train=train, steps=2, attention_weight=1.0, gradient_checkpointing=again)
        for again in (False, True)
    ]
    for first, second in zip(results[0].history, results[1].history, strict=True):
        assert second == pytest.approx(first | {"seconds": second["seconds"]}, rel=1e-5)


# Several processes


def test_gradients_are_summed_in_messages_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [3, 2, 5, 20, 1, 1, 1, 1, 1]
    parameters = [nn.Parameter(torch.zeros(n)) for n in sizes]
    for i, parameter in enumerate(parameters):
        parameter.grad = None if i == 1 else torch.full_like(parameter, i + 1.0)
    sent: list[int] = []

    def reduce(message: torch.Tensor, how: str) -> torch.Tensor:
        assert (how, message.dtype) == ("sum", torch.float32)
        sent.append(message.numel())
        return 2 * message

    monkeypatch.setattr(processes, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(processes, "reduce", reduce)
    monkeypatch.setattr(processes, "MESSAGE", 4 * 6)
    processes.sum_gradients(iter(parameters))
    assert sent == [5, 5, 20, 5]
    assert [None if p.grad is None else p.grad.unique().tolist() for p in parameters] == [
        None if i == 1 else [2 * (i + 1.0)] for i in range(len(sizes))
    ]


def test_two_processes_on_one_gpu_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter([["a cuda:0", "a cuda:0", "b cuda:0"], ["a cuda:0", "a cuda:1", "b cuda:0"]])
    monkeypatch.setattr(processes, "_gathered", lambda mine: next(places))
    assert processes.shared_gpus(torch.device("cuda")) == ["a cuda:0"]
    assert processes.shared_gpus(torch.device("cuda")) == []
    assert processes.shared_gpus(torch.device("cpu")) == []
    monkeypatch.setattr(runs, "shared_gpus", lambda device: ["a cuda:0"])
    with pytest.raises(DistillationError, match=r"several processes have their model on one GPU \(a cuda:0\): give each its own"):
        learn(student("lora"), tmp_path / "run", train="lora")
    assert not (tmp_path / "run").exists()
