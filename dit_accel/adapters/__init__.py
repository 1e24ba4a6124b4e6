"""Trained methods on disk: folders, published checkpoints, model cards."""
