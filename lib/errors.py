"""The two named errors of the project; everything else is a bug or the caller's own exception."""


class InputError(ValueError):
    """What the user gave is wrong: one line with the value, the allowed range and the fix (exit
    code 2).
    """


class PlacementError(RuntimeError):
    """The residency runtime cannot go on safely: the model must not compute with what is there."""
