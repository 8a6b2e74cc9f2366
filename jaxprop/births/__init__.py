"""Births of non-finite numbers: a program run equation by equation, forward and back."""
