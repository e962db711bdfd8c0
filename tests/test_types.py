"""The README's programs type-check as a user's would, with the types that the package ships."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.S)
WRONG = (  # seen only where the package's types are
    "wrong: str = sde.reverse(score).sample((2, 2))",
    "sde.reverse(score).sample((2, 2), seat=0)",
    "sde.flow_ode(score).log_prob(data, rtoll=1e-3)",
)
USED = '''
"""What calls return: mypy takes Any for nothing here."""

import torch
from torch import Tensor
from typing_extensions import assert_type

from sdeflow import SDE, Gaussian, Score, fit, objectives, x
from sdeflow.likelihood import LogProb
from sdeflow.scores import Conditional, GaussianMixture, ScoreFunction
from sdeflow.solving.solution import Answer, Solution
from sdeflow.training.run import Fit

sde, z = SDE(f=-x, g=1.4, T=3), torch.randn(64, 2)
assert_type(sde.kernel.moments(z, 0.5), tuple[Tensor, Tensor])
assert_type(sde.kernel.sample(z, 0.5, seed=0), Tensor)
assert_type(sde.kernel.score(z, z, 0.5), Tensor)
assert_type(sde.kernel.log_prob(z, z, 0.5), Tensor)
assert_type(sde.kernel.half_log_snr(0.5), Tensor)
assert_type(sde.kernel.coefficients(torch.tensor(0.5)), tuple[Tensor, Tensor, Tensor])
assert_type(sde.prior, Gaussian)
assert_type(sde.lift(z), Tensor)
assert_type(sde.simulate(z, [1.0, 3.0], steps=10, dtype=torch.float64), Tensor)
assert_type(sde.fit_prior(z, components=2).sample((2, 2)), Tensor)
assert_type(sde.bridge(z).sample(z, 0.5), Tensor)
assert_type(sde.bridge(z).paths(z, [0.5, 1.0]), Tensor)
assert_type(sde.bridge(z).moments(z, 0.5), tuple[Tensor, Tensor])

exact = GaussianMixture(sde, [[0.0, 0.0]], [1.0])
assert_type(exact.sample(3), Tensor)
assert_type(exact.log_prob(z), Tensor)
assert_type(exact.weights, Tensor)
score = Score(torch.nn.Linear(2, 2), sde)
assert_type(score.data_std, Tensor)
assert_type(score.given(1), Conditional)
assert_type(score(z, 0.5, torch.zeros(64)), Tensor)
for each in (exact, score, score.given(1)):
    assert_type(each(z, 0.5), Tensor)
    assert_type(each.noise(z, 0.5), Tensor)
    assert_type(each.denoise(z, 0.5), Tensor)

assert_type(fit(score, (z, torch.zeros(64)), 10, objective=objectives.Denoising("edm")), Fit)
assert_type(fit(score, z.numpy(), 10).losses, list[float])
assert_type(objectives.Denoising().value(exact, z), tuple[float, float])
flow = sde.flow_ode(score)
assert_type(flow.log_prob(z), Tensor)
assert_type(flow.log_prob(z, full=True), LogProb)
assert_type(flow.likelihood(z, steps=8), LogProb)
assert_type(flow.solve((2, 2), steps=8, seed=0), Solution)
assert_type(flow.solve(z, "euler", 8, encode=True).x, Tensor)
assert_type(flow.decode(flow.encode(z, steps=8), steps=8, denoise=True), Tensor)
assert_type(flow.sample((2, 2), trajectory=True), Answer)
assert_type(flow.bits_per_dim(z.long(), levels=4, low=0.0, high=1.0), Tensor)


class Guided(ScoreFunction):
    """A score of one's own."""

    def __init__(self, sde: SDE, towards: Tensor) -> None:
        super().__init__(sde)
        self.towards = towards

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.towards - x

    def rows(self, index: Tensor | slice) -> "Guided":
        return Guided(sde, self.towards[index])


assert_type(sde.reverse(Guided(sde, z)).sample((64, 2)), Tensor)
'''


@pytest.mark.slow
def test_programs_type_check(tmp_path):
    lines = "\n".join(BLOCK.findall((ROOT / "README.md").read_text())).splitlines()
    (tmp_path / "program.py").write_text("\n".join([*lines, *WRONG, ""]))
    (tmp_path / "used.py").write_text(USED)
    options = ["--config-file=", "--ignore-missing-imports", f"--cache-dir={ROOT / '.mypy_cache' / 'readme'}"]
    command = [sys.executable, "-m", "mypy", *options, "program.py", "used.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # found as an installed package is
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    errors = [line for line in found.splitlines() if ": error:" in line]
    assert all(error.startswith("program.py:") for error in errors), found
    assert {int(error.split(":")[1]) - len(lines) for error in errors} == {1, 2, 3}, found
    assert "Tensor" in errors[0] and "seat" in errors[1] and "rtoll" in found
