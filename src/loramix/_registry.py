"""Registries of routers, gatings and file formats by name. Other packages may add their own."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, ValuesView
from typing import Generic, TypeVar

from loramix.errors import ConfigurationError

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name.

    Args:
        what: the field or argument that holds such a name.
        register: the function by which another package adds one, for messages.
    """

    def __init__(self, what: str, register: str) -> None:
        self.what, self.register = what, register
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register an entry; the same one again changes nothing.

        Raises:
            ConfigurationError: the name is taken by another one.
        """
        if self._entries.setdefault(name, entry) is not entry:
            raise ConfigurationError(
                f"A {self.what} is registered under a name of its own.",
                received=f"{name!r}, which is {self._entries[name]!r}",
                remedy="choose another name",
            )

    def __getitem__(self, name: str) -> T:
        """The entry of this name.

        Raises:
            ConfigurationError: there is none.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ConfigurationError(
                f"{self.what} must be one of {', '.join(map(repr, self._entries))}.",
                received=f"{self.what}={name!r}",
                remedy=f"correct the name, import the package that registers it with {self.register}, or upgrade "
                "loramix if a newer one saved it",
            )
        return entry

    def values(self) -> ValuesView[T]:
        """The entries, in the order of their registration."""
        return self._entries.values()


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import the modules of a package in the order of their names: each registers what it defines."""
    for name in sorted(module.name for module in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{name}")
