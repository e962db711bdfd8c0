"""Runs the README's Python blocks in order, and compares what they print with the text block after each.

Numbers may differ in their last digits from machine to machine: they are compared to 2 % where they are
floats, and everything else to the letter.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.S)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")


def main() -> int:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    if not blocks:
        sys.exit("README.md has no Python block")
    names: dict = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)  # the README is ours: this is what it is for
        compare(printed.getvalue(), expected)
    print(f"README: {len(blocks)} block{'s' if len(blocks) > 1 else ''} ran and printed what it says")
    return 0


def compare(printed: str, expected: str) -> None:
    """Exits where ``printed`` is not ``expected``."""
    if NUMBER.sub("#", printed).strip() != NUMBER.sub("#", expected).strip():
        sys.exit(f"the README says\n{expected}\nbut its code prints\n{printed}")
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        if abs(float(ours) - float(theirs)) > 0.02 * abs(float(theirs)) + 0.005:
            sys.exit(f"the README says {theirs} where its code prints {ours}:\n{printed}")


if __name__ == "__main__":
    sys.exit(main())
