r"""Networks that a score model learns: functions of (x, t).

A net here is an `nn.Module` called as `net(x, t)` or `net(x, t, y)`:

- x, shape (batch, *event): the state;
- t, shape (batch,), in x's dtype: one number that says how noisy x is, for example a time in [0, 1],
  a noise level up to about 80, or a log-SNR in about [-14, 14];
- y, optional: integer class labels, shape (batch,); condition vectors, shape (batch, condition); or the tuple of
  both;

and it returns a tensor of the shape of x. A net does not know what this tensor means (a score, a noise,
a denoised state). Its caller decides that, and scales the input and the output. All nets end in a layer
of zeros, so an untrained net returns 0.
"""

from .embedding import Conditioning as Conditioning
from .embedding import TimeEmbedding as TimeEmbedding
from .mlp import MLP as MLP
from .unet import UNet as UNet

__all__ = ["MLP", "Conditioning", "TimeEmbedding", "UNet"]
