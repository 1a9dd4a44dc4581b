"""The one exception for what a user can cause."""


class UserError(ValueError):
    """Bad input: the message says in one line what is wrong, the value, and what is allowed.

    Command-line tools print it without a traceback and exit with status 2 (`nnscaler.command.run`).
    Anything else that escapes a command is a defect of ours and keeps its traceback.
    """
