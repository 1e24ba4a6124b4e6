"""Where a method enters a user's model: the verbs, a model's anatomy, processors, contexts, weights."""
