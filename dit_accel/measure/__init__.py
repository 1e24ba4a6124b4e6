"""Measurements: quality, speed, evaluation pages, the demo."""
