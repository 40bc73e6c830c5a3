"""Writes docs/cli.md from the help texts themselves. `make docs` runs it; a test holds the page against it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from loramix.cli.app import COMMANDS

PAGE = Path(__file__).with_name("cli.md")
TERMINAL = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONUTF8": "1"}
HEAD = """# The command line

```bash
loramix demo                                                    # build, train, compare and use a mixture
loramix generate demo --prompt "def read_lines(path):"          # print the text as it is written
loramix generate demo --prompt "def f(" --show-experts          # each token in the colour of its leading expert
echo "2 + 2 =" | loramix generate demo --prompt - --do-sample --temperature 0.7 --seed 1 --json
loramix info mixture                                            # what a folder holds, without loading its base model
loramix train-expert --base ./base --data texts/ --output math  # train a LoRA expert
loramix train run.yaml                                          # train a router: see training.md
loramix distil mixture --data texts/ --output one-pass          # a router that needs one pass
loramix eval mixture --data test.jsonl                          # base, experts, uniform mixture, X-LoRA, oracle
loramix inspect demo --text "def f(x):"                         # the leading expert of each token, and the numbers
loramix convert mixture for-peft --to peft                      # for PEFT, the original library, mistral.rs
loramix edit mixture smaller --remove code                      # add, remove, replace, rename, reorder experts
loramix check demo                                              # which layers of a base model experts can adapt
loramix bench demo                                              # time per token, compared with the base model
loramix doctor                                                  # versions, devices, what is missing: for an issue
```

MIXTURE is a folder, a Hub id, or `demo`, the mixture that ships with loramix. Its base model is the one that it names,
unless `--base` gives another.

Exit codes: 0 done; 1 an error of loramix, with its rule, what was received and the remedy on stderr, or a demo whose
router did not beat its rivals; 2 wrong usage. With `--json`, stdout holds one JSON document and nothing else.

The rest of this page is made from the help texts by `make docs`. No `--help` loads torch.
"""


def help_text(*command: str) -> str:
    """What `loramix COMMAND --help` prints, 100 columns wide and without colour."""
    code = "from loramix.cli import main; main()"
    words = [sys.executable, "-c", code, *command, "--help"]
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "FORCE_", "PY_COLORS"))
    }
    printed = subprocess.run(words, env=kept | TERMINAL, capture_output=True, text=True, encoding="utf-8", check=True)
    return "\n".join(line.rstrip() for line in printed.stdout.strip().splitlines())


def page() -> str:
    """The whole page."""
    sections = [(("loramix", *command), help_text(*command)) for command in ((), *((name,) for name in COMMANDS))]
    return HEAD + "".join(f"\n## {' '.join(title)}\n\n```text\n{text}\n```\n" for title, text in sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
