"""The planner: a quality budget or a speed in, an assignment of specs to layers, heads and noise levels out. Named `planner`, because
`dit_accel.plan` is the function."""
