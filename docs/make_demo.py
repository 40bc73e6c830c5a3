"""Runs the demo and puts what it printed and drew into the README: `make readme`.

Writes docs/demo.svg (the generated texts in their colours), docs/routing.png and the text between the README's marks.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from loramix.analysis.show.terminal import legend
from loramix.demo import DemoResult, run_demo
from loramix.demo.show import written_panel

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- demo -->\n", "<!-- /demo -->\n"
SECTION = """```text
{printed}
```

![What the mixture wrote after a prompt of each domain; each token has the colour of its leading expert](docs/demo.svg)

![The weight of each expert in each token of a held-out text that switches domain](docs/routing.png)
"""


def console(colour: bool) -> Console:
    """A terminal of 100 columns that remembers what it shows."""
    return Console(
        file=io.StringIO(), record=True, width=100, highlight=False, force_terminal=colour, color_system="truecolor"
    )


def written_in_colour(result: DemoResult) -> str:
    """What the mixture wrote, as a picture of a terminal that needs no font from elsewhere."""
    screen = console(colour=True)
    screen.print(legend(result.switching.experts, screen))
    for text in result.written:
        screen.print(written_panel(text, screen))
    picture = screen.export_svg(title="loramix demo")
    return re.sub(r"@font-face \{.*?\}\s*|[\x00-\x08\x0b-\x1f]", "", picture, flags=re.DOTALL)


def main() -> None:
    """Run the demo in a temporary folder, then write."""
    screen = console(colour=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = run_demo(console=screen)
        assert result.picture is not None
        shutil.copyfile(result.picture, DOCS / "routing.png")
        os.chdir(DOCS)
    printed = screen.export_text().partition("\n5. ")[0]
    section = SECTION.format(printed="\n".join(line.rstrip() for line in printed.strip().splitlines()))
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + section + END + rest.partition(END)[2], encoding="utf-8")
    (DOCS / "demo.svg").write_text(written_in_colour(result), encoding="utf-8")


if __name__ == "__main__":
    main()
