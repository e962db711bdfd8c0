"""What steps= costs and gives on a trained network: seconds, calls, and the distance to 1,000 steps of the flow.

    python benchmarks/sampling.py

The figures are those of the table in docs/sample.rst. Half a minute on one core.
"""

from __future__ import annotations

import time

import torch

import sdeflow


def trained() -> sdeflow.Score:
    """A small network of two Gaussians in the plane, after 1,000 steps."""
    torch.manual_seed(0)
    sde = sdeflow.catalog.VP()
    means, variances = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.04, 0.01])
    exact = sdeflow.scores.GaussianMixture(sde, means, variances, weights=torch.tensor([0.3, 0.7]))
    score = sdeflow.Score(sdeflow.nets.MLP(2), sde)
    sdeflow.fit(score, exact.sample(20_000, seed=1), 1000, 256, seed=0, progress=False)
    return score


def main() -> None:
    """Prints one line for each way to ask."""
    torch.set_num_threads(1)
    flow = sdeflow.catalog.VP().flow_ode(trained())
    truth = flow.sample((500, 2), steps=1000, seed=0)
    for options in ({"steps": 10}, {"steps": 20}, {"steps": 50}, {"steps": 100}, {}):
        start = time.process_time()
        found = flow.solve((500, 2), seed=0, **options)
        seconds = time.process_time() - start
        distances = (found.x - truth).norm(dim=1)
        far = 100 * float((distances > 0.1).double().mean())
        print(f"{options!s:14} {found.calls:4} calls  {seconds:5.2f} s", end="  ")
        print(f"median distance {float(distances.median()):.1e}, over 0.1 for {far:.1f} %")


if __name__ == "__main__":
    main()
