r"""Networks: what stands for the unknown function of (x, t) that a score model learns.

A net here is an `nn.Module` called as `net(x, t)` or `net(x, t, y)`:

- x, shape (batch, *event): the state;
- t, shape (batch,), in x's dtype: any one number that says how noisy x is, be it a time in [0, 1],
  a noise level up to about 80, or a log-SNR in about [-14, 14];
- y, shape (batch,), optional: integer class labels;

and it returns a tensor shaped as x. Nothing here knows what that tensor means (a score, a noise, a
denoised state): that is the business of whoever calls the net, and so is scaling its input and
output. All nets end in a layer of zeros, so an untrained one returns 0.
"""

from .embedding import Conditioning as Conditioning
from .embedding import TimeEmbedding as TimeEmbedding
from .mlp import MLP as MLP
from .unet import UNet as UNet

__all__ = ["MLP", "Conditioning", "TimeEmbedding", "UNet"]
