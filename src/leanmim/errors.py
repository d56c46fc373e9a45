"""The one kind of error a user can mend."""


class UserError(ValueError):
    """Something in the user's input is wrong; the message names it and the remedy. The command line exits with 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone."""
        return [f"{type(self).__name__}: {self}"]


class CannotWrite(UserError):
    """The disk is full, read-only, over quota, or gone; what was written before stays."""


class Damaged(UserError):
    """A checkpoint is missing, or does not hold what it should."""
