"""Gradients and updates for training loops."""
