"""The one exception that memdec raises for what a user can mend: a wrong folder, a broken file, a setting that cannot
be."""


class MemdecError(Exception):
    """A mistake or a mishap that the user can act on; the message says what was found, what was wanted and what to do
    next.

    The command line prints the message alone and exits with status 1 (``--debug`` shows the traceback). Wrong
    arguments to an op raise ``ValueError`` or ``TypeError`` instead.
    """
