"""The same weights in another dtype or quantised are the same weights, other weights are not; a hash is computed once."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill_randomly, tiny_transformer
from distill_fixtures import CALL, PROMPTS, distill, half_pipe, prompt_pipe, quick, student

import dit_accel
from dit_accel import SLA
from dit_accel.adapters.folder import CONFIG, load_adapter, save_adapter
from dit_accel.errors import AdapterError
from dit_accel.patch import fingerprint, state, weights
from dit_accel.patch.fingerprint import check, known_hash, same_weights


def quantised(model: Any, config: str) -> Any:
    from torchao import quantization

    quantization.quantize_(model, getattr(quantization, config)())
    return model


def noisy(scale: float) -> Callable[[Any], Any]:
    """Every weight changed by that share of itself, as training on does."""

    def change(model: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
        return model

    return change


def touched(model: Any) -> Any:
    with torch.no_grad():
        model.proj_out.weight[3, 5] += 1e-3
    return model


CAST: dict[str, Callable[[Any], Any]] = {
    "itself": lambda m: m,
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "float16": lambda m: m.to(torch.float16),
    "float64": lambda m: m.to(torch.float64),
    "through-bfloat16": lambda m: m.to(torch.bfloat16).float(),
    "through-both": lambda m: m.to(torch.bfloat16).to(torch.float16),
    "float8": lambda m: m.to(torch.float8_e4m3fn),
    "int8": lambda m: quantised(m, "Int8WeightOnlyConfig"),
    "int8-bfloat16": lambda m: quantised(m.to(torch.bfloat16), "Int8WeightOnlyConfig"),
}
OTHER: dict[str, Callable[[Any], Any]] = {
    "one-number": touched,
    "trained-on": noisy(0.02),
    "trained-on-bfloat16": lambda m: noisy(0.02)(m).to(torch.bfloat16),
    "another-model": lambda m: tiny_transformer(seed=7),
    "another-model-bfloat16": lambda m: tiny_transformer(seed=7).to(torch.bfloat16),
    "another-model-int8": lambda m: quantised(tiny_transformer(seed=7), "Int8WeightOnlyConfig"),
    "negated-int8": lambda m: quantised(noisy(0)(scaled(m, -1)), "Int8WeightOnlyConfig"),
    "fewer-layers": lambda m: tiny_transformer(double=1),
}


def scaled(model: Any, factor: float) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


@pytest.mark.parametrize("recorded", ["itself", "bfloat16", "int8"])
@pytest.mark.parametrize("now", CAST)
def test_a_cast_changes_no_weights(recorded: str, now: str) -> None:
    made = CAST[recorded](tiny_transformer())
    record = json.loads(json.dumps(fingerprint.fingerprint(made)))
    check(record)
    assert same_weights(CAST[now](tiny_transformer()), record, known_hash(made))


@pytest.mark.parametrize("recorded", ["itself", "bfloat16"])
@pytest.mark.parametrize("now", OTHER)
def test_other_weights_are_told(recorded: str, now: str) -> None:
    made = CAST[recorded](tiny_transformer())
    other = OTHER[now](tiny_transformer())
    if (recorded, now) != ("bfloat16", "one-number"):  # below what bfloat16 rounds away, beyond what is sampled, it can't be seen
        assert not same_weights(other, fingerprint.fingerprint(made), known_hash(made))


def test_acceleration_changes_no_fingerprint() -> None:
    plain, accelerated = tiny_transformer(), dit_accel.accelerate(tiny_transformer(), SLA(0.2))
    fill_randomly(next(iter(state.operators_of(accelerated).values())))
    assert fingerprint.fingerprint(accelerated) == fingerprint.fingerprint(plain)
    assert known_hash(accelerated) == known_hash(plain) == weights.teacher_hash(plain)


def test_a_fingerprint_is_small_for_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "TENSORS", 20)
    monkeypatch.setattr(fingerprint, "NUMBERS", 200)
    made = fingerprint.fingerprint(tiny_transformer())
    assert 10 < len(made) <= 20
    assert {len(text) for _, text in made.values()} == {56 if len(made) <= 14 else 4 * -(-4 * max(8, 200 // len(made)) // 3)}


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by every module whose weights are read in full."""
    modules: list[Any] = []
    real = fingerprint.teacher_hash
    monkeypatch.setattr(fingerprint, "teacher_hash", lambda m: modules.append(m) or real(m))
    return modules


CHANGES: dict[str, Callable[[torch.nn.Parameter], object]] = {
    "in-place": lambda p: p[0].add_(1e-3),
    "data": lambda p: p.data.mul_(1.5),
    "exchanged": lambda p: setattr(p, "data", p.data * 1.5),
    "dtype": lambda p: setattr(p, "data", p.data.double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_hash_is_computed_once_for_the_same_weights(hashed: list[Any], change: Callable[[torch.nn.Parameter], object]) -> None:
    model = tiny_transformer()
    first = known_hash(model)
    assert known_hash(model) == first
    model.to(torch.float32)
    dit_accel.accelerate(model, SLA(0.2))
    assert known_hash(model) == first
    assert len(hashed) == 1
    with torch.no_grad():
        change(model.proj_out.weight)
    assert known_hash(model) == weights.teacher_hash(model) != first
    assert len(hashed) == 2


def test_every_module_has_its_own_hash(hashed: list[Any]) -> None:
    model = tiny_transformer()
    known_hash(model)
    twin = noisy(0.1)(copy.deepcopy(model))
    assert known_hash(twin) == weights.teacher_hash(twin) != known_hash(model)
    assert len(hashed) == 2


def test_weights_made_under_inference_mode_are_known(hashed: list[Any]) -> None:
    with torch.inference_mode():
        model = tiny_transformer()
        first = known_hash(model)
        model.proj_out.weight.mul_(2)
        assert known_hash(model) != first


def test_a_distillation_reads_the_weights_once(hashed: list[Any], tmp_path: Path) -> None:
    pipe = student("lora")
    distill(pipe, PROMPTS, quick(tmp_path / "run", train="lora"), progress=False, **CALL)
    save_adapter(pipe, tmp_path / "a")
    assert hashed == [pipe.transformer]
    load_adapter(other := prompt_pipe(), tmp_path / "a")
    assert hashed == [pipe.transformer, other.transformer]
    save_adapter(other, tmp_path / "b")
    assert len(hashed) == 2


def test_the_same_model_in_half_precision_takes_an_adapter_without_a_word(hashed: list[Any], tmp_path: Path) -> None:
    folder = save_adapter(student(), tmp_path / "a")
    hashed.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*differ from these")
        load_adapter(half_pipe(), folder)
    assert hashed == []  # the samples tell


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_an_adapter_without_a_fingerprint_loads_as_before(tmp_path: Path) -> None:
    folder = save_adapter(student(), tmp_path / "a")
    edit(folder, lambda config: config.pop("base_model_fingerprint"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*differ from these")
        load_adapter(prompt_pipe(), folder)
    with pytest.warns(UserWarning, match="differ from these"):
        load_adapter(half_pipe(), folder)


DAMAGED: dict[str, Any] = {
    "list": [1], "entry": {"a": 3}, "dtype": {"a": ["int3", "AAAA"]}, "text": {"a": ["float32", "?"]}, "empty": {"a": ["float32", ""]},
    "bytes": {"a": ["float32", "AAA="]}, "number": 5,
}  # fmt: skip


@pytest.mark.parametrize("value", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_fingerprint_is_refused(value: Any, tmp_path: Path) -> None:
    folder = save_adapter(student(), tmp_path / "a")
    edit(folder, lambda config: config.update(base_model_fingerprint=value))
    pipe = prompt_pipe()
    with pytest.raises(AdapterError, match=r"dit_accel_config\.json is damaged: .*fingerprint .*(must be|are not base64)"):
        load_adapter(pipe, folder)
    assert not hasattr(pipe.transformer, state.CONTEXT)
