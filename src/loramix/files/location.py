"""One folder, local or on the Hub, and the files in it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from loramix.files.hub import HubOptions, find_any, names_in


@dataclass(frozen=True)
class Location:
    """A folder that remembers which files it has: on the Hub, each look-up is a request.

    Args:
        identifier: a local folder or a Hub identifier (see `loramix.files.hub`).
        options: revision, subfolder, token and cache.
    """

    identifier: str | os.PathLike[str]
    options: HubOptions = field(default_factory=HubOptions)
    _found: dict[tuple[str, ...], Path | None] = field(
        default_factory=dict[tuple[str, ...], "Path | None"], init=False, repr=False, compare=False
    )

    def find(self, *names: str) -> Path | None:
        """The path of the first of several files that exists, downloaded if need be; None if there is none.

        Raises:
            CheckpointNotFoundError: no such folder or repository, or one that cannot be reached.
        """
        if names not in self._found:
            self._found[names] = find_any(self.identifier, names, self.options)
        return self._found[names]

    def names(self) -> list[str]:
        """The names of the files and folders in it, for messages; none where the Hub does not tell."""
        return names_in(self.identifier, self.options)

    def below(self, folder: str) -> Location:
        """A subfolder."""
        return Location(self.identifier, self.options.below(folder))

    def elsewhere(self, identifier: str | os.PathLike[str]) -> Location:
        """Another folder or repository, with the same token and cache."""
        return Location(identifier, self.options.elsewhere())

    def __str__(self) -> str:
        return "/".join(filter(None, (os.fspath(self.identifier), self.options.subfolder)))
