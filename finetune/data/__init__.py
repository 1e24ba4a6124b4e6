"""Samples to distil from: collecting, storing and reading them."""
