"""The two kinds of trouble a person hears about, each in one sentence.

The message says what was wanted, what came, and what to do. The command line turns a `UserError`
into exit status 2 and a `Failure` into exit status 1; neither ever shows a traceback.
"""


class UserError(ValueError):
    """The person asked for what cannot be: an unknown name, a wrong option, a bad file."""


class Failure(RuntimeError):
    """The request was sound and the work failed: a damaged file, a full disk, a NaN."""
