"""Births of numbers that are not finite: a program run equation by equation, and back."""
