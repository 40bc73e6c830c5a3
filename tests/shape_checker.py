"""The run-time checker behind the jaxtyping annotations; pytest's settings in pyproject.toml name it.

jaxtyping decorates functions, not classes, and beartype knows `Self` inside of decorated classes only: it is let pass.
An int passes for a float, as type checkers have it.
"""

from __future__ import annotations

from typing import Self

from beartype import BeartypeConf, FrozenDict, beartype

check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: object}), is_pep484_tower=True))
