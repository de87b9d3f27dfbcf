"""What the user did wrong, and what the programs answer the shell."""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # stopped on request with a checkpoint written (EX_TEMPFAIL): run again to go on


class UserError(Exception):
    """Bad configuration, data or checkpoint.

    The message is one plain paragraph that names the file, the key and the remedy. The programs in `launch/` print it
    without a traceback and exit with `EXIT_USER_ERROR`.
    """
