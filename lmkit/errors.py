"""What can end a stage, each with its exit code; `lmkit.stage.run` prints the message alone, without a traceback."""


class BadInput(ValueError):
    """Something the user gave cannot be used. The message says what was found, what was wanted, what to do."""

    exit_code = 2


class Locked(Exception):
    """Another process works on this stage."""

    exit_code = 3


class Stopped(Exception):
    """A guard ended the run: a non-finite number, or a limit on KL, EOS rate or entropy."""

    exit_code = 4


class CorruptInput(Exception):
    """An artifact does not match its manifest."""

    exit_code = 5


class Interrupted(BaseException):
    """A signal ended the run; running the same command again goes on from the last checkpoint.

    Like KeyboardInterrupt it is no Exception: raised in the middle of a library, no `except Exception` may swallow it.
    """

    exit_code = 75
