"""Where a method enters a user's model: the verbs, the modes, the patch itself, a model's anatomy, processors, contexts, weights."""
