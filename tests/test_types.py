"""The README's programs type-check as a user's would, with the types that the package ships."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.S)
WRONG = "wrong: str = sde.reverse(score).sample((2, 2))"  # seen only where the package's types are


@pytest.mark.slow
def test_the_readme_type_checks(tmp_path):
    lines = "\n".join(BLOCK.findall((ROOT / "README.md").read_text())).splitlines()
    (tmp_path / "program.py").write_text("\n".join([*lines, WRONG, ""]))
    options = ["--config-file=", "--ignore-missing-imports", f"--cache-dir={ROOT / '.mypy_cache' / 'readme'}"]
    command = [sys.executable, "-m", "mypy", *options, "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # found as an installed package is
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    errors = [line for line in found.splitlines() if ": error:" in line]
    assert len(errors) == 1, found
    assert errors[0].startswith(f"program.py:{len(lines) + 1}:")
    assert "Tensor" in errors[0]
