"""What was trained, on disk: folders, published checkpoints, model cards."""
