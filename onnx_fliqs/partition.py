"""Sets of names that belong together."""

from collections.abc import Iterable, Sequence

__all__ = ["united"]


def united(
    names: Iterable[str], groups: Iterable[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """The finest partition of the names that splits no group.

    Args:
        names: Distinct.
        groups: Of these names; they may overlap.

    Returns:
        The parts, each in the order of the names, and in the order of their first ones.
    """
    order = {name: index for index, name in enumerate(names)}
    part: dict[str, tuple[str, ...]] = {name: (name,) for name in order}
    for group in groups:
        members = {name for member in group for name in part[member]}
        whole = tuple(sorted(members, key=order.__getitem__))
        part |= dict.fromkeys(whole, whole)
    return tuple(dict.fromkeys(part.values()))
