"""The one kind of error a user can mend."""


class UserError(ValueError):
    """Something in the user's input is wrong; the message names it and the remedy. The command line exits with 2."""
