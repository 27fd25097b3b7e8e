"""The one exception that a user is meant to read: a sentence on what is wrong and what to do."""


class PlatformError(Exception):
    """Something the user can put right.

    The message names what is at fault (file, line, field, value, port …) and what to do about it; the command
    line prints it alone, without a traceback.
    """
