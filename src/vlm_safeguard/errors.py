"""The one exception a user of this package has to know."""


class SafeguardError(Exception):
    """Something the user can mend; the message says what was wrong and what to do.

    Raised wherever a guard cannot be fitted, loaded, attached or verified. While a guard is
    attached it also means that nothing was generated: the guard fails closed.
    """
