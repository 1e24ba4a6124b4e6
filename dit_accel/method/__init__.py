"""What is computed: a method is a spec whose slots are filled with parts; presets fill them for the published methods."""

from dit_accel.method import parts
from dit_accel.method.assignment import Assignment, Rule
from dit_accel.method.parts import *  # noqa: F403  the parts' names are listed there
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.method.spec import AttentionSpec

__all__ = ["CLEAR", "GNA", "SLA", "Assignment", "AttentionSpec", "Fovea", "Rule"]
__all__ += parts.__all__
