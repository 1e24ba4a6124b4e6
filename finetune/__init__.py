"""Distillation of an accelerated pipeline from itself: collect, replay, train, evaluate."""
