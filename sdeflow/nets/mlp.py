r"""A residual multilayer perceptron for states that are vectors, such as points in the plane.

Each block adds a two-layer perceptron to its input h. Between its layers, the embedding e of time and
class modulates it (feature-wise linear modulation, FiLM: Perez et al., arXiv 1709.07871):

    h <- h + W_2 SiLU((1 + a(e)) * W_1 SiLU(h) + b(e)).

W_2 starts at zero, so every block starts as the identity, and the net at zero. There is no
normalisation, because the length of the state of a diffusion carries information. Use this net for up to
a few hundred unordered coordinates. If neighbours matter (signals, images, volumes), use `UNet`.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .embedding import Conditioning, checked_input, require_dropout, require_sizes


class Block(nn.Module):
    r"""Creates a residual block of two layers.

    Args:
        width: The length of the hidden vectors.
        embedding: The length of the embedding.
        dropout: The probability of dropping a hidden unit in training.
    """

    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.film = nn.Linear(embedding, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Maps h, shape (batch, width), and e, shape (batch, embedding), to (batch, width)."""
        scale, shift = self.film(e).chunk(2, dim=-1)
        u = self.inner(F.silu(h)) * (1 + scale) + shift
        return h + self.outer(self.dropout(F.silu(u)))


class MLP(nn.Module):
    r"""Creates a residual multilayer perceptron, called as net(x, t) or net(x, t, y).

    Args:
        features: The length of the state.
        width: The length of the hidden vectors.
        depth: The number of residual blocks, each of two layers.
        classes: The number of classes; 0 for a net without labels.
        condition: The length of a condition vector; 0 for a net without one. With `classes` too, y is the tuple
            (labels, vectors).
        dropout: The probability of dropping a hidden unit in training.
        out_features: The length of the output; by default that of the state.

    Raises:
        ValueError: If a size is not positive, a number negative, or `dropout` not in [0, 1).
    """

    def __init__(
        self,
        features: int,
        width: int = 128,
        depth: int = 3,
        classes: int = 0,
        *,
        condition: int = 0,
        dropout: float = 0.0,
        out_features: int | None = None,
    ) -> None:
        super().__init__()
        out_features = features if out_features is None else out_features
        require_sizes("MLP", features=features, width=width, depth=depth, out_features=out_features)
        require_dropout(dropout)
        self.features = features
        self.classes = classes
        self.conditioning = Conditioning(width, classes, condition)
        self.stem = nn.Linear(features, width)
        # Inputs of unit size should reach the curved part of SiLU; otherwise fine structure is learned last.
        nn.init.normal_(self.stem.weight, std=3 / features**0.5)
        self.blocks = nn.ModuleList(Block(width, width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, out_features)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def null(self, y: object) -> object:
        """What stands for "no condition" in the place of y."""
        return self.conditioning.null(y)

    def measure_condition(self, y: object) -> None:
        """Takes the scale of condition vectors from those of the training data; `fit` calls it."""
        self.conditioning.measure(y)

    def forward(self, x: Tensor, t: Tensor, y: object = None) -> Tensor:
        r"""Evaluates the net.

        Args:
            x: The state, shape (batch, features).
            t: The time, noise level or log-SNR, shape (batch,).
            y: Class labels, shape (batch,), integers; condition vectors, shape (batch, condition); or the tuple of
                both. None for no condition.

        Returns:
            A tensor of shape (batch, out_features).

        Raises:
            ValueError: If a shape or a label does not fit.
        """
        x = checked_input(x, self.stem.weight)
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, this MLP takes (batch, {self.features}): "
                "flatten the state, or build the net with the features it has"
            )
        e = self.conditioning(len(x), t, y)
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, e)
        return self.head(F.silu(h))
