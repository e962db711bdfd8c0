"""Settings of every test: one thread each (two run at once), and a fixed global seed."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_global_seed():
    torch.manual_seed(0)
