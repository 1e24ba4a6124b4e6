"""Whatever users do to an accelerated model, in any order: the original comes back to the bit, or a refusal came first and nothing changed.

A plain twin lives the same life without acceleration. Its weights fit into bfloat16, so that casting there and back loses nothing.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from conftest import forward_arguments, tiny_transformer
from diffusers.hooks import HookRegistry
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from peft import LoraConfig
from safetensors.torch import load_file
from test_offloaded_weights import CPU, TRAINED, train
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, SLA, AttentionSpec, Fovea
from dit_accel.errors import DitAccelError

SPECS: list[AttentionSpec] = [Fovea(0.3), SLA(0.3, block=(16, 16)), CLEAR(1.0)]
ARGUMENTS = forward_arguments(4, 5)
EXAMPLES = 300
PHASES = [Phase.generate]


def template() -> Any:
    transformer = tiny_transformer(double=1, single=0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(parameter.bfloat16())
    return transformer


def run(transformer: Any) -> Tensor:
    arguments = {k: v.to(transformer.dtype) if k in ("hidden_states", "encoder_hidden_states") else v for k, v in ARGUMENTS.items()}
    arguments["pooled_projections"] = arguments["pooled_projections"].to(transformer.dtype)
    with torch.no_grad():
        output: Tensor = transformer(**arguments, return_dict=False)[0]
    return output


class Life(RuleBasedStateMachine):
    """One model and its twin."""

    plain: Any
    adapters: dict[str, Path]
    folder: Path

    @initialize(style=st.sampled_from(["", "loaded", "fused"]), what=st.sampled_from(["", *TRAINED, *TRAINED[1:]]))
    def born(self, style: str, what: str) -> None:
        self.model, self.twin = copy.deepcopy(self.plain), copy.deepcopy(self.plain)
        self.offloaded = ""
        self.loaded = ""  # what the adapter in it was trained for
        self.touched = False  # whether the adapter's values were cast or had a LoRA in them
        self.rounded = False  # whether the weights do not fit into bfloat16
        if style:
            self.load_lora()
        if style == "fused":
            self.fuse_lora(["style"], True)
        if what:
            self.load_adapter(what)

    @property
    def accelerated(self) -> bool:
        return hasattr(self.model, "_dit_accel")

    @property
    def exchanged(self) -> bool:
        """Whether trained weights are in the place of the twin's."""
        return self.accelerated and bool(self.model._dit_accel.weights)

    @property
    def styled(self) -> bool:
        return "style" in getattr(self.twin, "peft_config", {})

    def same(self) -> None:
        assert torch.equal(run(self.model), run(self.twin))

    def done(self, verb: Callable[[], object]) -> bool:
        """Whether a verb of ours did its work; where it refused, nothing changed."""
        before, accelerated = run(self.model), self.accelerated
        try:
            verb()
        except DitAccelError:
            assert self.accelerated == accelerated
            assert torch.equal(run(self.model), before)
            return False
        return True

    # Ours

    @precondition(lambda self: not self.accelerated)
    @rule(spec=st.sampled_from(SPECS))
    def accelerate(self, spec: AttentionSpec) -> None:
        if self.done(lambda: dit_accel.accelerate(self.model, spec)):
            self.loaded = ""

    @precondition(lambda self: not self.accelerated)
    @rule(what=st.sampled_from(TRAINED))
    def load_adapter(self, what: str) -> None:
        if self.done(lambda: dit_accel.load_adapter(self.model, self.adapters[what])):
            self.loaded, self.touched = what, self.model.dtype != torch.float32

    @precondition(lambda self: self.accelerated)
    @rule()
    def dense(self) -> None:
        def look() -> None:
            with dit_accel.dense(self.model):
                self.same()

        before = run(self.model)
        self.done(look)
        assert torch.equal(run(self.model), before)

    @precondition(lambda self: self.accelerated)
    @rule()
    def restore(self) -> None:
        if self.done(lambda: dit_accel.restore(self.model)):
            self.same()

    @precondition(lambda self: self.accelerated)
    @rule()
    def save_adapter(self) -> None:
        before = run(self.model)
        done = self.done(lambda: dit_accel.save_adapter(self.model, self.folder / "adapter"))
        assert torch.equal(run(self.model), before)
        if done and self.loaded and not self.touched:
            for file in self.adapters[self.loaded].glob("*.safetensors"):
                saved, expected = load_file(self.folder / "adapter" / file.name), load_file(file)
                assert list(saved) == list(expected)
                assert [name for name in expected if not torch.equal(saved[name], expected[name])] == []

    @precondition(lambda self: self.accelerated and not self.offloaded)
    @rule()
    def save_pretrained(self) -> None:
        if self.done(lambda: self.model.save_pretrained(self.folder / "ours")):
            self.twin.save_pretrained(self.folder / "twin")
            saved, expected = (load_file(self.folder / name / "diffusion_pytorch_model.safetensors") for name in ("ours", "twin"))
            assert list(saved) == list(expected)
            assert [name for name in expected if not torch.equal(saved[name], expected[name])] == []

    # What happens to models

    @precondition(lambda self: not self.offloaded)
    @rule(way=st.sampled_from(["sequential", "block_level", "leaf_level"]))
    def offload(self, way: str) -> None:
        for model in (self.model, self.twin):
            if way == "sequential":
                cpu_offload(model, execution_device=CPU)
            else:
                model.enable_group_offload(CPU, CPU, offload_type=way, num_blocks_per_group=1)
        self.offloaded = way

    @precondition(lambda self: self.offloaded)
    @rule()
    def end_offloading(self) -> None:
        for model in (self.model, self.twin):
            if self.offloaded == "sequential":
                remove_hook_from_submodules(model)
            else:
                HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading")
        self.offloaded = ""

    @precondition(lambda self: not (self.rounded and self.exchanged))  # originals keep the precision that they had
    @rule(dtype=st.sampled_from([torch.bfloat16, torch.float32]))
    def cast(self, dtype: torch.dtype) -> None:
        for model in (self.model, self.twin):
            model.to(dtype)
        self.touched = True

    @precondition(lambda self: not self.offloaded)
    @rule()
    def copy(self) -> None:
        self.model, self.twin = copy.deepcopy(self.model), copy.deepcopy(self.twin)

    @precondition(lambda self: not self.offloaded and not self.styled)
    @rule()
    def load_lora(self) -> None:
        for model in (self.model, self.twin):
            torch.manual_seed(7)
            model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name="style")

    @precondition(lambda self: self.styled and not self.offloaded)
    @rule()
    def unload_lora(self) -> None:
        fused = any(getattr(module, "merged_adapters", ()) for module in self.model.modules())
        self.model.unload_lora()
        if not (self.exchanged and fused):  # else the LoRA stays in trained weights, which are never exchanged any more
            self.twin.unload_lora()

    @precondition(lambda self: self.styled and self.offloaded != "sequential")
    @rule(names=st.sampled_from([["style"], None]), fuse=st.booleans())
    def fuse_lora(self, names: list[str] | None, fuse: bool) -> None:
        for model in (self.model, self.twin):
            if model is self.model or not self.exchanged:  # the LoRA goes into the trained weights, and the originals wait
                model.fuse_lora(adapter_names=names) if fuse else model.unfuse_lora()
        self.rounded = self.touched = True

    @precondition(lambda self: self.styled)
    @rule(on=st.booleans())
    def switch_lora(self, on: bool) -> None:
        for model in (self.model, self.twin):
            model.enable_lora() if on else model.disable_lora()
            run(model)  # PEFT takes a fused LoRA that was switched off out of the weights here

    def teardown(self) -> None:
        if hasattr(self, "model"):
            if self.accelerated:
                self.restore()
            else:
                self.same()


@pytest.mark.composes("any order of LoRA, offloading, casting, copying, saving")
def test_every_life_leads_back_to_the_original(tmp_path: Path) -> None:
    plain, made = template(), {}
    for what in TRAINED:
        torch.manual_seed(0)
        train(transformer := dit_accel.accelerate(copy.deepcopy(plain), SPECS[1]), what)
        made[what] = dit_accel.save_adapter(transformer, tmp_path / what)
    machine = type("Lives", (Life,), {"plain": plain, "adapters": made, "folder": tmp_path})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=6,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=PHASES,
            ),
        )
