"""One colour for each expert, the same in pictures, terminal and reports.

The first seven are those of Okabe and Ito (jfly.uni-koeln.de/color), which people of any colour vision tell apart. Each
further one is that colour, out of a grid without near-black and near-white, that is farthest from all before it. The
distance is taken in OKLab, as the least of four: without a colour vision deficiency, and with protanopia, deuteranopia
and tritanopia (Machado et al. 2009). The two nearest of 24 colours are 0.067 apart, of 64 only 0.036: with more than
about 24 experts, show the name with the colour.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

PALETTE = (
    *("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#f0e442"),
    *("#892700", "#14ffeb", "#3b00d8", "#624562", "#9d6cff", "#b1c49d", "#89584e", "#b1eba7", "#27d8e2", "#c40093"),
    *("#8027ff", "#e2c462", "#89b176", "#800089", "#c431c4", "#a74e0a", "#ce9db1", "#4e6289", "#eb763b", "#b176ce"),
    *("#8014b1", "#8093f5", "#6c804e", "#7662e2", "#ffa7ce", "#9d6276", "#764545", "#e214a7", "#93e2ff", "#e280ce"),
    *("#62a74e", "#ceeb80", "#6c586c", "#a70a31", "#e20031", "#e2cec4", "#c4ba76", "#b1d893", "#6231e2", "#89c4ff"),
    *("#c4d800", "#f54e89", "#8076e2", "#76c445", "#931dc4", "#584e80", "#ff8093", "#b1806c", "#9dc4c4", "#a745ff"),
    *("#62a7ce", "#76b19d", "#c49dff", "#6c1d9d", "#626c1d", "#b11da7", "#8976b1"),
)
"""64 colours, as #rrggbb."""


def expert_colours(names: Sequence[str]) -> dict[str, str]:
    """The colour of each expert, by its place among all experts of its mixture.

    Args:
        names: all experts, in the mixture's order (`record.palette`); from the 65th on, colours repeat.
    """
    return dict(zip(names, itertools.cycle(PALETTE), strict=False))
