"""The card of an adapter, and sharing it."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from distill_fixtures import student

import dit_accel
from dit_accel.adapters.folder import CONFIG, WEIGHTS
from dit_accel.adapters.model_card import CARD, MARK
from dit_accel.errors import AdapterError

RECORD = {"config": {"steps": 300, "train": "lora"}, "prompts": 60, "held_out_error_before": 0.24, "held_out_error_after": 0.109375}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "panda.png").write_bytes(b"")
    return dit_accel.save_adapter(student(), tmp_path / "adapter", training=RECORD)


def test_the_card_says_what_the_config_says(folder: Path) -> None:
    text = (folder / CARD).read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"library_name": "diffusers", "tags": ["dit_accel", "attention"]}
    for line in ("| held out error after | 0.1094 |", "| config: steps | 300 |", "| prompts | 60 |", "![panda.png](panda.png)"):
        assert line in text
    assert "FluxTransformer2DModel" in text


def test_a_base_model_of_the_hub_is_named(tmp_path: Path) -> None:
    pipe = student()
    pipe.transformer.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    text = (dit_accel.save_adapter(pipe, tmp_path) / CARD).read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert "Nothing was trained" in text


def test_saving_again_renews_the_card_but_keeps_a_persons_own(folder: Path) -> None:
    dit_accel.save_adapter(student(), folder, training={"prompts": 7})
    assert "| prompts | 7 |" in (folder / CARD).read_text(encoding="utf-8")
    own = (folder / CARD).read_text(encoding="utf-8").replace(MARK, "My words.")
    (folder / CARD).write_text(own, encoding="utf-8")
    dit_accel.save_adapter(student(), folder)
    assert (folder / CARD).read_text(encoding="utf-8") == own


class Hub:
    """What is asked of the hub."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, token: str | None = None) -> None:
        self.calls.clear()

    def create_repo(self, repo: str, **settings: Any) -> str:
        self.calls.append((repo, settings))
        return f"hub/{repo}"

    def upload_folder(self, **settings: Any) -> None:
        self.calls.append(("upload", settings))


def test_pushing_uploads_what_load_adapter_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert dit_accel.push_adapter(folder, "someone/clear", private=True) == "hub/someone/clear"
    (repo, settings), (_, upload) = Hub.calls
    assert (repo, settings) == ("someone/clear", {"private": True, "exist_ok": True})
    assert upload["repo_id"] == "someone/clear"
    assert {CONFIG, WEIGHTS, CARD, "*.png"} <= set(upload["allow_patterns"])


def test_a_damaged_adapter_is_not_pushed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls.clear()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(AdapterError, match="is damaged or altered"):
        dit_accel.push_adapter(folder, "someone/clear")
    assert Hub.calls == []


def test_a_name_that_the_hub_refuses(folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"can't be uploaded to 'a/b/c'"):
        dit_accel.push_adapter(folder, "a/b/c")
