"""`python -m dit_accel.cli`, as `accelerate launch -m` needs it."""

from dit_accel.cli.app import app

app()
