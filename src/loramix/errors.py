"""Every exception that loramix raises on purpose.

LoramixError
├── ConfigurationError (ValueError)              a configuration that cannot work
├── CheckpointError                              files: an expert, a mixture
│   ├── CheckpointNotFoundError (FileNotFoundError)  no such path or Hub id, or nothing of ours in it
│   ├── CorruptCheckpointError                       a file that is there and cannot be read
│   ├── IncompleteCheckpointError                    a file that lacks tensors its configuration asks for
│   └── SaveError (OSError)                          nothing was lost: the earlier state, or the new one, is whole
├── AdapterError (ValueError)                    one expert, as opposed to its files
│   ├── AdapterNameError                             a name that cannot be a folder, or two that clash
│   ├── UnsupportedAdapterError                      a feature of the expert that a mixture cannot carry
│   └── AdapterMismatchError                         an expert of another base model
├── ModelError (TypeError)                       a base model that cannot carry a mixture
├── RoutingError (RuntimeError)                  scalings that are missing, or are not those of these tokens
├── DataError (ValueError)                       text to train on or to evaluate with
├── TrainingError (RuntimeError)                 a training that cannot go on
├── CacheError (ValueError)                      a key-value cache that this mixture did not fill
├── UnsupportedOperationError (NotImplementedError)  a call that has no meaning for a mixture
└── VersionError (ImportError)                   an installed torch or transformers that is too old
"""

from __future__ import annotations

from typing import ClassVar


class LoramixError(Exception):
    """The root of the tree: what the rule is, what came instead, and what to do about it.

    Args:
        rule: what must hold, as one sentence.
        received: what was found instead.
        remedy: what to change or to type.
    """

    _separator: ClassVar[str] = "\n  "

    def __init__(self, rule: str, *, received: str, remedy: str) -> None:
        super().__init__(self._separator.join((rule, f"received: {received}", f"remedy: {remedy}")))
        self.rule = rule
        self.received = received
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.rule, self.received, self.remedy)


def _rebuild(kind: type[LoramixError], rule: str, received: str, remedy: str) -> LoramixError:
    return kind(rule, received=received, remedy=remedy)


class ConfigurationError(LoramixError, ValueError):
    """A configuration that cannot work."""


class CheckpointError(LoramixError):
    """Something about files."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such path or Hub id, or none of the expected files in it."""


class CorruptCheckpointError(CheckpointError):
    """A file that is there and cannot be read: truncated, empty, or not what its name says."""


class IncompleteCheckpointError(CheckpointError):
    """A file that lacks tensors its configuration asks for."""


class SaveError(CheckpointError, OSError):
    """A save that did not finish; the folder still holds a whole state, and the message says which."""


class AdapterError(LoramixError, ValueError):
    """Something about one expert."""


class AdapterNameError(AdapterError):
    """An expert's name that cannot be a folder, or two experts of one name."""


class UnsupportedAdapterError(AdapterError):
    """A feature of the expert that a mixture cannot carry."""


class AdapterMismatchError(AdapterError):
    """An expert that was trained for another base model."""


class ModelError(LoramixError, TypeError):
    """A base model that cannot carry a mixture."""


class RoutingError(LoramixError, RuntimeError):
    """Scalings that are missing, or that are not those of the tokens at hand."""


class DataError(LoramixError, ValueError):
    """Text to train on, or to evaluate with, that cannot be used."""


class TrainingError(LoramixError, RuntimeError):
    """A training that cannot go on; what was saved before is still there."""


class CacheError(LoramixError, ValueError):
    """A key-value cache that this mixture did not fill."""


class UnsupportedOperationError(LoramixError, NotImplementedError):
    """A call that has no meaning for a mixture."""


class VersionError(LoramixError, ImportError):
    """An installed torch or transformers that is too old; its message is one line."""

    _separator = " "
