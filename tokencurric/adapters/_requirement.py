"""Imported before anything that imports transformers, so that a missing or unfit version is named."""

from importlib.metadata import PackageNotFoundError, version

from tokencurric.errors import MissingDependencyError

TRANSFORMERS = ">=5.23,<6"  # what hooks rely on was established on these versions


def check(found: str | None) -> None:
    """Raise unless `found` is a version of transformers that the adapters were made for.

    Raises:
        MissingDependencyError: it is not, or None was found.

    Example:
        >>> check("5.24.1")
    """
    numbers = (0,) if found is None else tuple(int(part) for part in found.split(".")[:2])
    if not (5, 23) <= numbers < (6,):
        raise MissingDependencyError(
            f"tokencurric.adapters needs transformers {TRANSFORMERS}; "
            f"{'it is not installed' if found is None else f'got transformers=={found}'}. Adapters hook into its "
            "models. Install tokencurric[hf]."
        )


def _installed() -> str | None:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


check(_installed())
