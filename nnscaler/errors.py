"""The one exception for what a user can cause."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class UserError(ValueError):
    """Bad input: the message says in one line what is wrong, the value, and what is allowed.

    Command-line tools print it without a traceback and exit with status 2 (`nnscaler.command.run`).
    Anything else that escapes a command is a defect of ours and keeps its traceback.
    """


def told_briefly(function: Callable[P, T]) -> Callable[P, T]:
    """A function of the published interface, whose UserErrors come without the way through this package.

    The message says all that a user needs. Level DEBUG of the log has the whole way.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            logger.debug("%s", error, exc_info=True)
            raise error.with_traceback(None) from None

    return called
