"""`loramix doctor`: what an issue report should say about the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from loramix.cli.terminal import print_json

if TYPE_CHECKING:
    from loramix.doctor import Diagnosis


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Print versions, devices and missing packages: one page to paste into an issue.

    On a GPU, the fused kernels are tried on small products.
    """
    from loramix.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        _show(diagnosis)


def _show(diagnosis: Diagnosis) -> None:
    needed = {name: version or "not installed" for name, version in diagnosis.packages.items()}
    optional = {name: version for names in diagnosis.optional.values() for name, version in names.items() if version}
    own = {"loramix": diagnosis.loramix, "python": diagnosis.python}
    _print("versions", own | needed | optional | diagnosis.related)
    _print("devices", diagnosis.devices)
    _print("fused kernels", diagnosis.fused)
    _print("optional, and not installed", {f"loramix[{e}]": ", ".join(names) for e, names in diagnosis.absent.items()})
    _print("environment", diagnosis.settings)


def _print(title: str, facts: Mapping[str, str]) -> None:
    print(title)
    width = max(map(len, facts), default=0)
    for name, value in facts.items() or {"none": ""}.items():
        print(f"  {name:{width}}  {value}".rstrip())
