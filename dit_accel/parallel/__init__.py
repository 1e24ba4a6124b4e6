"""Context parallelism: one sequence over several processes. It is below the patch: it knows tensors, heads and processes, no model."""
