"""What is wrong with what a user gave."""


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the remedy (exit code 2)."""
