"""One family of errors: everything this library raises on purpose is a `TokencurricError`.

Each subclass also derives from the built-in exception a caller would expect, so `except ValueError` keeps working.
"""


class TokencurricError(Exception):
    """Base of all errors raised on purpose by tokencurric.

    Example:
        >>> from tokencurric import TokencurricError, keep_count
        >>> try:
        ...     keep_count(576, 1.5)
        ... except TokencurricError as error:
        ...     print(type(error).__name__)
        RangeError
    """


class RangeError(TokencurricError, ValueError):
    """A number lies outside the range in which it has a meaning."""


class ShapeError(TokencurricError, ValueError):
    """Tensors do not fit together."""


class NotACompressorError(TokencurricError, TypeError):
    """What was passed as a compressor is none: a name, a class, a plain function, or an object that lacks something."""


class MissingSignalError(TokencurricError, ValueError):
    """A compressor asked for something that the model, or the layer, cannot give."""


class UnsupportedModelError(TokencurricError, TypeError):
    """The model is not built in a way that tokens can be dropped from correctly."""


class StateError(TokencurricError, RuntimeError):
    """A call came at a moment at which it cannot be served."""


class DataError(TokencurricError, ValueError):
    """A row of the data cannot be used as it is."""


class MissingDependencyError(TokencurricError, ImportError):
    """An optional package is needed for this part of the library."""
