"""Published checkpoints that do not fit are refused by the names of what is wrong, with the pipeline as it was."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from distill_fixtures import same, state
from published import (
    Tensors,
    clear_tensors,
    flux_pipe,
    quantised,
    saved,
    shared_tensors,
    turbo_by_hand,
    turbo_tensors,
    turbo_values,
    untouched,
    wan_pipe,
)
from test_adapter import edit_config, edit_tensors

from dit_accel import CLEAR, SLA, AttentionSpec, Fovea, load_adapter, save_adapter
from dit_accel.adapters.folder import CONFIG, FULL, WHOLE
from dit_accel.adapters.importers import local_file
from dit_accel.errors import AdapterError
from dit_accel.patch.holders import Holders

Change = Callable[[Tensors], object]
FLUX_Q, WAN_Q = "single_transformer_blocks.37.attn.to_q.weight", "blocks.1.self_attn.q.weight"
PROJ = "blocks.1.self_attn.attn_op.local_attn.proj_l"
POOL = "transformer_blocks.3.attn.processor.spatial_weight"


def moved(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


CLEAR_DAMAGE: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(FLUX_Q), f"1 missing: {FLUX_Q}"),
    "missing-pooling": (lambda t: t.pop(POOL), f"1 missing: {POOL}"),
    "unknown": (lambda t: t.update({"one.more": torch.zeros(2)}), r"1 unknown: one\.more"),
    "text-projection": (
        lambda t: t.update({"transformer_blocks.0.attn.add_q_proj.weight": torch.zeros(32, 32)}), r"1 unknown: .*add_q_proj\.weight"
    ),
    "one-layer-more": (lambda t: t.update({FLUX_Q.replace("37", "38"): torch.zeros(32, 32)}), "1 unknown: single_transformer_blocks.38"),
    "misshaped": (lambda t: t.update({FLUX_Q: torch.zeros(32, 16)}), rf"1 wrong: {FLUX_Q}: \(32, 16\).*, not \(32, 32\)"),
    "transposed-pooling": (lambda t: t.update({POOL: t[POOL].squeeze()}), rf"1 wrong: {POOL}: \(4, 4\).*, not \(1, 1, 1, 4, 1, 4, 1\)"),
    "integers": (lambda t: t.update({FLUX_Q: torch.zeros(32, 32, dtype=torch.int8)}), rf"1 wrong: {FLUX_Q}: \(32, 32\) of I8, not"),
    "renamed": (lambda t: moved(t, FLUX_Q, FLUX_Q + "s"), rf"1 missing: {FLUX_Q}; 1 unknown: {FLUX_Q}s"),
    "empty": (lambda t: t.clear(), r"no published checkpoint that is known .*\[\] of 0"),
    "of-another-kind": (lambda t: (t.clear(), t.update(x=torch.zeros(1))), r"no published checkpoint that is known .*\['x'\] of 1"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), CLEAR_DAMAGE.values(), ids=CLEAR_DAMAGE)
def test_a_file_of_clear_that_does_not_fit_is_refused(tmp_path: Path, change: Change, says: str) -> None:
    pipe, tensors = flux_pipe(), clear_tensors(4)
    change(tensors)
    file = saved(tensors, tmp_path, "clear_local_8_down_4")
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=says):
        load_adapter(pipe, file)


TURBO_DAMAGE: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(WAN_Q), r"1 missing: blocks\.1\.attn1\.to_q\.weight"),
    "missing-outside": (lambda t: t.pop("head.modulation"), "1 missing: scale_shift_table"),
    "missing-projection": (lambda t: t.pop(f"{PROJ}.bias"), r"1 missing: blocks\.1\.attn1\.proj_l\.bias"),
    "no-projections": (lambda t: [t.pop(k) for k in list(t) if "proj_l" in k], r"4 missing: blocks\.0\.attn1\.proj_l\.bias"),
    "projections-alone": (lambda t: [t.pop(k) for k in list(t) if "proj_l" not in k], r"one naming scheme.*not \[\]"),
    "unknown": (lambda t: t.update({"one.more": torch.zeros(2)}), r"1 unknown: one\.more"),
    "one-block-more": (lambda t: t.update({WAN_Q.replace("1", "2"): torch.zeros(144, 144)}), r"1 unknown: blocks\.2\.self_attn\.q\.weight"),
    "misshaped": (lambda t: t.update({WAN_Q: torch.zeros(144, 72)}), rf"1 wrong: {WAN_Q}: \(144, 72\).*, not \(144, 144\)"),
    "misshaped-projection": (
        lambda t: t.update({f"{PROJ}.weight": torch.zeros(12, 12)}), rf"1 wrong: {PROJ}\.weight: \(12, 12\).*, not \(72, 72\)"
    ),
    "misshaped-patch": (
        lambda t: t.update({"patch_embedding.weight": torch.zeros(144, 63)}), r"\(144, 63\).*, not \(144, 16, 1, 2, 2\) or \(144, 64\)"
    ),
    "unscaled": (lambda t: moved(t, WAN_Q, WAN_Q.replace("weight", "int8_weight")), r"1 missing: blocks\.1\.attn1\.to_q\.scale; 1 wrong"),
    "twice": (
        lambda t: t.update({"blocks.1.self_attn.q.int8_weight": torch.zeros(144, 144, dtype=torch.int8)}),
        r"blocks\.1\.attn1\.to_q\.weight twice, as blocks\.1\.self_attn\.q\.\w+ and blocks\.1\.self_attn\.q\.\w+",
    ),
    "mixed-schemes": (lambda t: moved(t, WAN_Q, "blocks.1.attn1.to_q.weight"), r"one naming scheme.*'diffusers', 'wan'"),
    "mixed-projections": (
        lambda t: moved(t, f"{PROJ}.weight", "blocks.1.attn1.attn_impl.proj_l.weight"), r"one naming scheme.*attn_impl.*local_attn"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), TURBO_DAMAGE.values(), ids=TURBO_DAMAGE)
def test_a_file_of_turbo_that_does_not_fit_is_refused(tmp_path: Path, change: Change, says: str) -> None:
    (pipe, _), tensors = wan_pipe(), turbo_tensors("official")
    change(tensors)
    file = saved(tensors, tmp_path)
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=says):
        load_adapter(pipe, file)


TILE_DAMAGE: dict[str, tuple[Change, str]] = {
    "missing-scale": (lambda t: t.pop("blocks.0.ffn.2.scale"), r"1 missing: blocks\.0\.ffn\.net\.2\.scale"),
    "misshaped-scale": (lambda t: t.update({"blocks.0.ffn.2.scale": torch.ones(1, 2)}), r"ffn\.2\.scale: \(1, 2\).*, not \(2, 2\)"),
    "scale-too-many": (lambda t: t.update({"head.head.scale": torch.ones(1, 2)}), r"1 unknown: head\.head\.scale"),
    "floats": (lambda t: t.update({"blocks.0.ffn.2.int8_weight": torch.ones(144, 160)}), r"ffn\.2\.int8_weight: .*, not .* of I8"),
    "misshaped": (
        lambda t: t.update({"blocks.0.ffn.2.int8_weight": torch.ones(144, 150, dtype=torch.int8)}),
        r"ffn\.2\.int8_weight: \(144, 150\).*, not \(144, 160\)",
    ),
}


@pytest.mark.parametrize(("change", "says"), TILE_DAMAGE.values(), ids=TILE_DAMAGE)
def test_int8_tiles_that_do_not_fit_are_refused(tmp_path: Path, change: Change, says: str) -> None:
    (pipe, _), (tensors, _) = wan_pipe(), quantised(turbo_tensors("official"))
    change(tensors)
    file = saved(tensors, tmp_path)
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=says):
        load_adapter(pipe, file)


@pytest.mark.parametrize("spec", [CLEAR(8), SLA(0.1, scope="none"), Fovea(0.1)], ids=str)
def test_a_method_without_the_projection_is_refused(tmp_path: Path, spec: AttentionSpec) -> None:
    for tensors in (turbo_tensors("official"), shared_tensors()):
        pipe, _ = wan_pipe()
        file = saved(tensors, tmp_path)
        with untouched(pipe.transformer), pytest.raises(AdapterError, match=r"requires spec=SLA\(\.\.\.\) with a linear rest, not"):
            load_adapter(pipe, file, spec=spec)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    clear, turbo = saved(clear_tensors(), tmp_path, "clear_local_8"), saved(turbo_tensors("official"), tmp_path)
    flux, (wan, _) = flux_pipe(), wan_pipe()
    with (
        untouched(flux.transformer),
        pytest.raises(AdapterError, match="for WanTransformer3DModel, which don't fit a FluxTransformer2DModel"),
    ):
        load_adapter(flux, turbo)
    with (
        untouched(wan.transformer),
        pytest.raises(AdapterError, match="for FluxTransformer2DModel, which don't fit a WanTransformer3DModel"),
    ):
        load_adapter(wan, clear)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:1000], lambda data: b"", lambda data: pickle.dumps({"a": 1})]
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    pipe, file = flux_pipe(), saved(clear_tensors(), tmp_path, "clear_local_8")
    file.write_bytes(damage(file.read_bytes()))
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=r"clear_local_8.* can't be read as \.safetensors"):
        load_adapter(pipe, file)


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_a_pickle_is_refused_unread_with_the_way_to_convert_it(tmp_path: Path, suffix: str) -> None:
    (pipe, _), file = wan_pipe(), tmp_path / f"TurboWan{suffix}"
    file.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with untouched(pipe.transformer), pytest.raises(AdapterError, match="a pickle, which can run code") as refusal:
        load_adapter(pipe, file)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AdapterError, match="a pickle"):
        load_adapter(pipe, f"owner/name/TurboWan{suffix}")
    assert f'torch.load("{file}"' in str(refusal.value)


def test_the_way_to_convert_a_pickle_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, _ = wan_pipe()
    torch.save(turbo_tensors("official"), "TurboWan.pth")
    with pytest.raises(AdapterError) as refusal:
        load_adapter(pipe, "TurboWan.pth")
    exec(str(refusal.value).split("'")[1])  # of python -c '...'
    load_adapter(pipe, "TurboWan.safetensors")
    assert same(state(pipe.transformer), state(turbo_by_hand(*turbo_values()).transformer))


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    for path, says in (
        (tmp_path / "notes.txt", r"notes\.txt is neither a folder made by save_adapter nor a \.safetensors file"),
        (tmp_path / "none.safetensors", "none.safetensors.*not there"),
        ("./none.safetensors", "none.safetensors.*not there"),
        ("none.safetensors", "none.safetensors.*not there"),
    ):
        with pytest.raises(AdapterError, match=says):
            local_file(path)
    assert local_file(tmp_path) is None
    assert local_file("owner/name") is None


def test_a_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match=r"'owner/name/clear_local_8\.safetensors' can't be downloaded: "):  # offline, as all tests are
        load_adapter(flux_pipe(), "owner/name/clear_local_8.safetensors")
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(saved(clear_tensors(), tmp_path, "clear_local_8"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    pipe = load_adapter(flux_pipe(), "owner/name/folder/clear_local_8.safetensors")
    assert asked == [("owner/name", "folder/clear_local_8.safetensors")]
    assert pipe.transformer._dit_accel.context.assignment.spec == CLEAR(8)


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = wan_pipe()
    file = saved(turbo_tensors("official"), tmp_path)
    put, changed = Holders._put, []

    def failing(holders: Holders, name: str, *rest: Any) -> Any:
        if name == "proj_out.bias" and changed:
            raise RuntimeError("no memory")
        changed.append(name)
        return put(holders, name, *rest)

    monkeypatch.setattr(Holders, "_put", failing)
    with untouched(pipe.transformer), pytest.raises(RuntimeError, match="no memory"):
        load_adapter(pipe, file)
    assert len(changed) > 1


# What became an adapter of ours

WHOLE_DAMAGE: dict[str, Change] = {
    "missing": lambda t: t.pop("proj_out.bias"),
    "unknown": lambda t: t.update({"proj_out.bia": torch.zeros(64)}),
    "misshaped": lambda t: t.update({"proj_out.bias": torch.zeros(63)}),
}


@pytest.mark.parametrize("change", WHOLE_DAMAGE.values(), ids=WHOLE_DAMAGE)
def test_all_weights_of_an_adapter_are_checked(tmp_path: Path, change: Change) -> None:
    folder = save_adapter(turbo_loaded(tmp_path), tmp_path / "adapter")
    edit_tensors(folder, WHOLE, change)
    pipe, _ = wan_pipe()
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=rf"{WHOLE} does not fit the model.*proj_out\.bia"):
        load_adapter(pipe, folder)


def test_an_adapter_has_one_file_of_full_weights(tmp_path: Path) -> None:
    folder = save_adapter(turbo_loaded(tmp_path), tmp_path / "adapter")
    edit_config(folder, lambda config: config["files"].update({FULL: "0"}))
    pipe, _ = wan_pipe()
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=rf"{CONFIG} must name the files .*{FULL} or {WHOLE}"):
        load_adapter(pipe, folder)


def turbo_loaded(folder: Path) -> Any:
    pipe, _ = wan_pipe()
    return load_adapter(pipe, saved(turbo_tensors("official"), folder))
