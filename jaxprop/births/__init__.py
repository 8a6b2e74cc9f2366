"""Where a number that is not finite was born: a program run equation by equation, and back."""
