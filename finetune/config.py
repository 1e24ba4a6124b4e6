"""The settings of a distillation."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dit_accel.errors import ArgumentError

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec

Trainable = Literal["parameters", "lora", "attention"]
OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation. Every field is checked, and ArgumentError raised where one can't be used.

    A run resumes only under the same settings, but for `output_dir`, `checkpoint_every` and `evaluate_every`. The losses are relative: an
    error of the teacher's own size counts 1.

    Args:
        steps: training steps, after those of the first stage.
        parameter_steps: steps of the first stage, which fits the method's own parameters layer by layer. None: 48 where some are found by
            least squares or choose blocks, else 0.
        batch_size: recorded forwards per step, shared by all processes.
        train: "parameters" (the method's own), "lora" (those and a LoRA on the attention's projections) or "attention" (those and the
            projections' full weights).
        lora_rank: rank of that LoRA.
        specs: one is drawn for each step, so that one adapter serves all; none: the pipeline's own.
        optimizer: "adamw", or "muon": orthogonalised momentum for the matrices that train="attention" opens, AdamW for the rest.
        learning_rate: of LoRA or weights.
        parameter_learning_rate: of the method's own parameters. None: 1e-2, and 1e-3 after least squares found them.
        warmup_steps: steps in which the rates rise from zero; then they fall along a cosine.
        weight_decay: of the optimizer.
        max_grad_norm: longer gradients are shortened to this norm.
        prediction_weight: of the loss of the model's prediction.
        attention_weight: of the loss of the attention outputs. Relative errors of single layers are far larger than the prediction's: at
            weight 1 they drown it. Above 0, one output of every layer is held at once, in its own dtype: image tokens × channels × layers
            (FLUX at 1024 px in bfloat16: 1.4 GB).
        flow_weight: above 0: train on the stored final latents at drawn noise levels in place of the recorded steps.
        mixed_precision: "no", or "bf16": autocast to bfloat16.
        gradient_checkpointing: compute forwards again in the backward pass, which takes less memory and more time.
        evaluate_every: steps between evaluations of the held-out prompts; 0: at start and end only.
        checkpoint_every: steps between checkpoints; the curve is drawn then, too.
        seed: of all that is drawn.
        output_dir: the folder of samples, checkpoints, log and curve.
    """

    steps: int = 1000
    parameter_steps: int | None = None
    batch_size: int = 1
    train: Trainable = "lora"
    lora_rank: int = 16
    specs: "tuple[AttentionSpec, ...]" = ()
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    parameter_learning_rate: float | None = None
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    prediction_weight: float = 1.0
    attention_weight: float = 0.03
    flow_weight: float = 0.0
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    evaluate_every: int = 0
    checkpoint_every: int = 100
    seed: int = 0
    output_dir: str = "dit-accel-distill"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank", "checkpoint_every"):
            self._check(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "an int >= 1")
        for name in ("warmup_steps", "evaluate_every", "seed"):
            self._check(name, type(getattr(self, name)) is int and getattr(self, name) >= 0, "an int >= 0")
        object.__setattr__(self, "specs", tuple(self.specs) if isinstance(self.specs, list | tuple) else self.specs)
        self._check("specs", isinstance(self.specs, tuple), "a tuple of AttentionSpec")
        if self.specs:
            from dit_accel.method import AttentionSpec  # it needs torch, which the command line's help does without

            self._check("specs", all(isinstance(spec, AttentionSpec) for spec in self.specs), "a tuple of AttentionSpec")
        steps = self.parameter_steps
        self._check("parameter_steps", steps is None or (type(steps) is int and steps >= 0), "None or an int >= 0")
        for name in ("learning_rate", "max_grad_norm"):
            self._check(name, type(getattr(self, name)) in (int, float) and 0 < getattr(self, name) < float("inf"), "a number > 0")
        rate = self.parameter_learning_rate
        self._check(
            "parameter_learning_rate", rate is None or (type(rate) in (int, float) and 0 < rate < float("inf")), "None or a number > 0"
        )
        for name in ("weight_decay", "prediction_weight", "attention_weight", "flow_weight"):
            self._check(name, type(getattr(self, name)) in (int, float) and 0 <= getattr(self, name) < float("inf"), "a number >= 0")
        self._check("train", self.train in ("parameters", "lora", "attention"), "'parameters', 'lora' or 'attention'")
        self._check("optimizer", self.optimizer in ("adamw", "muon"), "'adamw' or 'muon'")
        if self.optimizer == "muon" and self.train != "attention":
            raise ArgumentError(f"optimizer='muon' requires train='attention', whose matrices it trains, not train={self.train!r}")
        self._check("mixed_precision", self.mixed_precision in ("no", "bf16"), "'no' or 'bf16'")
        self._check("gradient_checkpointing", isinstance(self.gradient_checkpointing, bool), "True or False")
        self._check("output_dir", isinstance(self.output_dir, str) and self.output_dir != "", "a path as a string")
        if self.prediction_weight + self.attention_weight + self.flow_weight == 0:
            raise ArgumentError("at least one of prediction_weight, attention_weight and flow_weight must be > 0")

    def _check(self, name: str, ok: bool, required: str) -> None:
        if not ok:
            raise ArgumentError(f"{name} must be {required}, not {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"specs": [spec.to_dict() for spec in self.specs]}
