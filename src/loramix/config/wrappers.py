"""Names of modules without the wrappers that compilers and distributed trainers put around a model or its parts.

Source: torch (`torch.compile`, DDP, FSDP, `checkpoint_wrapper`); DeepSpeed and Lightning, which wrap whole models.
"""

from __future__ import annotations

import re

_NAMES = "|".join(
    (
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "module",
    )
)
_WRAPPER = re.compile(rf"(?<![\w-])(?:{_NAMES})\\?\.|\.(?:{_NAMES})$")


def unwrapped(name: str) -> str:
    """A module's path, a parameter's name or an expression for them, without the names of wrappers in any place.

    A model's own module of such a name is left out as well: names are compared after both were passed through here.
    """
    return _WRAPPER.sub("", name)
