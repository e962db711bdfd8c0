r"""A U-Net for signals, images and volumes: states of shape (batch, channels, *size).

The U-Net (Ronneberger et al., arXiv 1505.04597) processes the state on several levels; each level has
half the resolution of the level before. Skip connections join the features of the way down to those of
the way up. With residual blocks, self-attention on the coarse levels and modulation by time it is the
network of denoising diffusion (Ho et al., arXiv 2006.11239) and, refined, of score SDEs (Song et al.,
arXiv 2011.13456), ADM (Dhariwal and Nichol, arXiv 2105.05233) and EDM (Karras et al., arXiv 2206.00364).
This net is small and general: one to three spatial dimensions, and few options.

- Residual block: GroupNorm, SiLU, convolution, GroupNorm modulated by the embedding (FiLM: Perez et
  al., arXiv 1709.07871), SiLU, dropout, convolution. The last convolution starts at zero, so that
  every block starts as the identity.
- The first block of a level pools (way down) or repeats (way up) its input, as in ADM. On the way up
  each block also takes the output of the corresponding block of the way down.
- The head starts at zero too: an untrained net returns 0.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .embedding import Conditioning, checked_input, is_whole, require_dropout, require_sizes

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLING = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def zeros(layer: nn.Module) -> nn.Module:
    """Sets the layer's parameters to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with at most 32 groups of at least 4 channels each, if the channels allow it."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels >= 4 * g))
    return nn.GroupNorm(groups, channels)


class Attention(nn.Module):
    r"""Creates self-attention among the positions of a grid, added to its input.

    Torch's fused attention kernels have no forward-mode derivative, no second derivative and no rule
    for `vmap`; likelihoods and energy models need all three. The kernels are faster on long sequences
    only, so they are used above `fused_above` positions, and the plain formula below.

    Args:
        channels: The channels of the grid.
        heads: The number of heads, a divisor of `channels`.
        spatial_dims: The dimensions of the grid.
    """

    fused_above = 1024

    def __init__(self, channels: int, heads: int, spatial_dims: int) -> None:
        super().__init__()
        convolution = CONVOLUTION[spatial_dims]
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = convolution(channels, 3 * channels, 1)
        self.out = zeros(convolution(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        """Maps (batch, channels, *size) to the same shape."""
        positions = prod(h.shape[2:])
        # (batch, 3 channels, *size) to three of (batch, heads, positions, channels per head)
        qkv = self.qkv(self.norm(h)).reshape(len(h), 3, self.heads, -1, positions)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        fused = positions > self.fused_above
        with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
            u = F.scaled_dot_product_attention(q, k, v)
        return h + self.out(u.transpose(-1, -2).reshape(h.shape))


class Block(nn.Module):
    r"""Creates a residual block that may change the channels, the resolution, and attend.

    Args:
        channels: The channels of the input, those of a skip connection included.
        out_channels: The channels of the output.
        embedding: The length of the embedding.
        spatial_dims: The dimensions of the grid.
        dropout: The probability of dropping a value in training.
        heads: The number of attention heads; 0 for a block without attention.
        resample: Applied to the input, before a skip connection joins it.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        spatial_dims: int,
        *,
        dropout: float = 0.0,
        heads: int = 0,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        convolution = CONVOLUTION[spatial_dims]
        self.resample = nn.Identity() if resample is None else resample
        self.norm_in = group_norm(channels)
        self.conv_in = convolution(channels, out_channels, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * out_channels)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeros(convolution(out_channels, out_channels, 3, padding=1))
        same = channels == out_channels
        self.shortcut = nn.Identity() if same else convolution(channels, out_channels, 1)
        self.attention = Attention(out_channels, heads, spatial_dims) if heads else nn.Identity()

    def forward(self, h: Tensor, e: Tensor, skip: Tensor | None = None) -> Tensor:
        r"""Evaluates the block.

        Args:
            h: The input, shape (batch, channels - channels of the skip connection, *size).
            e: The embedding, shape (batch, embedding).
            skip: The skip connection, which joins h after resampling, shape (batch, its channels, *new size).

        Returns:
            A tensor of shape (batch, out_channels, *new size).
        """
        h = self.resample(h)
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        u = self.conv_in(F.silu(self.norm_in(h)))
        film = self.film(e).unflatten(-1, (-1, *[1] * (h.ndim - 2)))
        scale, shift = film.chunk(2, dim=1)
        u = F.silu(self.norm_out(u) * (1 + scale) + shift)
        return self.attention(self.shortcut(h) + self.conv_out(self.dropout(u)))


class UNet(nn.Module):
    r"""Creates a U-Net, called as net(x, t) or net(x, t, y).

    Args:
        channels: The channels of the state.
        width: The channels of the first level.
        multipliers: The channels of each level, in units of `width`, finest level first. Its length
            is the number of levels, and each size of the state must be a multiple of
            2 ** (levels - 1).
        blocks: The number of residual blocks per level, on the way down and on the way up.
        attention: The levels with self-attention, as Python indices: 0 is the finest level, -1 the
            coarsest.
        spatial_dims: 1 for signals, 2 for images, 3 for volumes.
        classes: The number of classes; 0 for a net without labels.
        condition: The length of a condition vector; 0 for a net without one. With `classes` too, y is the tuple
            (labels, vectors).
        dropout: The probability of dropping a value in training. It helps if there are few data.
        out_channels: The channels of the output; by default those of the state.
        head_width: The channels per attention head. If it does not divide the channels of a level, that
            level has one head.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> net = UNet(3, width=32, multipliers=(1, 2, 2), attention=(-1,))
        >>> net(torch.randn(4, 3, 16, 16), torch.rand(4)).shape
        torch.Size([4, 3, 16, 16])
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (-1,),
        spatial_dims: int = 2,
        classes: int = 0,
        condition: int = 0,
        dropout: float = 0.0,
        out_channels: int | None = None,
        head_width: int = 32,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        if not is_whole(spatial_dims) or spatial_dims not in CONVOLUTION:
            raise ValueError(f"spatial_dims={spatial_dims!r}: a UNet takes 1, 2 or 3")
        require_sizes(
            "UNet", channels=channels, width=width, blocks=blocks, out_channels=out_channels, head_width=head_width
        )
        for name, values in (("multipliers", multipliers), ("attention", attention)):
            if not isinstance(values, list | tuple) or not all(map(is_whole, values)):
                raise ValueError(f"UNet({name}={values!r}): give a tuple of integers")
        levels = len(multipliers)
        if not levels or min(multipliers) < 1:
            raise ValueError(
                f"UNet(multipliers={tuple(multipliers)}): give positive numbers, and at least one multiplier"
            )
        require_dropout(dropout)
        if not all(-levels <= level < levels for level in attention):
            raise ValueError(
                f"attention={tuple(attention)}: this UNet has {levels} levels, "
                f"numbered 0 to {levels - 1} or -{levels} to -1"
            )
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.divisor = 2 ** (levels - 1)

        embedding = 4 * width
        attended = {level % levels for level in attention}
        widths = [width * multiplier for multiplier in multipliers]

        def block(channels: int, level: int, skip: int = 0, resample: nn.Module | None = None) -> Block:
            c = widths[level]
            heads = (c // head_width if c % head_width == 0 else 1) * (level in attended)
            return Block(
                channels + skip,
                c,
                embedding,
                spatial_dims,
                dropout=dropout,
                heads=heads,
                resample=resample,
            )

        self.classes = classes
        self.conditioning = Conditioning(embedding, classes, condition)
        self.stem = CONVOLUTION[spatial_dims](channels, width, 3, padding=1)
        c = width
        self.encoder = nn.ModuleList()
        for level in range(levels):
            for i in range(blocks):
                pool = POOLING[spatial_dims](2) if level > 0 and i == 0 else None
                self.encoder.append(block(c, level, resample=pool))
                c = widths[level]
        self.middle = block(c, levels - 1)
        self.decoder = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(blocks):
                repeat = nn.Upsample(scale_factor=2) if level < levels - 1 and i == 0 else None
                self.decoder.append(block(c, level, skip=widths[level], resample=repeat))
                c = widths[level]
        self.norm = group_norm(c)
        self.head = zeros(CONVOLUTION[spatial_dims](c, out_channels, 3, padding=1))

    def null(self, y: object) -> object:
        """What stands for "no condition" in the place of y."""
        return self.conditioning.null(y)

    def measure_condition(self, y: object) -> None:
        """Takes the scale of condition vectors from those of the training data; `fit` calls it."""
        self.conditioning.measure(y)

    def forward(self, x: Tensor, t: Tensor, y: object = None) -> Tensor:
        r"""Evaluates the net.

        Args:
            x: The state, shape (batch, channels, *size), with as many sizes as `spatial_dims`.
            t: The time, noise level or log-SNR, shape (batch,).
            y: Class labels, shape (batch,), integers; condition vectors, shape (batch, condition); or the tuple of
                both. None for no condition.

        Returns:
            A tensor of shape (batch, out_channels, *size).

        Raises:
            ValueError: If a shape or a label does not fit.
        """
        x = checked_input(x, self.stem.weight)
        if x.ndim != 2 + self.spatial_dims or x.shape[1] != self.channels:
            names = ("depth", "height", "width")[-self.spatial_dims :]
            raise ValueError(
                f"x has shape {tuple(x.shape)}, this UNet takes (batch, {self.channels}, "
                f"{', '.join(names)}): build it with the channels= and spatial_dims= of x"
            )
        if any(size % self.divisor for size in x.shape[2:]):
            raise ValueError(
                f"x has size {tuple(x.shape[2:])}, but each must be a multiple of "
                f"{self.divisor} = 2 ** (levels - 1): pad or crop x, or give fewer multipliers"
            )
        e = self.conditioning(len(x), t, y)
        h = self.stem(x)
        skips = []
        for block in self.encoder:
            h = block(h, e)
            skips.append(h)
        h = self.middle(h, e)
        for block in self.decoder:
            h = block(h, e, skips.pop())
        return self.head(F.silu(self.norm(h)))
