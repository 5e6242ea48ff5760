"""Cells for deep equilibrium layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difflayers.errors import ProblemError


class TransformerCell(nn.Module):
    """One transformer layer as a cell ``(z, x) -> z``; at equilibrium, endlessly many with the same weights.

    ::

        h = z + norm(x)                         injection
        a = norm(h + attention(h))
        z = norm(a + W₂ gelu(W₁ a + b₁) + b₂)

    with layer norms and multi-head self-attention, ``softmax(QKᵀ / √d)V`` (Bai, Kolter, Koltun 2019, NeurIPS, "Deep
    equilibrium models", where ``x`` is added to queries, keys and values alone; added to ``z``, it also makes the cell
    a contraction at initialization). Attention is plain products and a softmax, since fused kernels have no second
    derivatives; its memory is quadratic in the length.

    ``z`` and ``x`` are ``(batch, length, features)``. It knows nothing of positions: encode them in ``x``, none of
    whose rows should be constant, for the norm leaves nothing of such a row.

    Args:
        features: of every position.
        heads: how many attention heads; divides ``features``.
        hidden: width of the feed-forward part; None is ``4 · features``.
        causal: whether a position sees only itself and those before it.
        dropout: probability with which entries of both residual branches are zeroed, one mask per solve.

    Raises:
        ProblemError: ``heads`` doesn't divide ``features``, or an input has another number of features.

    >>> import torch
    >>> from difflayers.fixedpoint import DEQ, TransformerCell
    >>> layer = DEQ(TransformerCell(16, heads=4, causal=True))
    >>> layer(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(
        self, features: int, heads: int, *, hidden: int | None = None, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if heads < 1 or features % heads:
            raise ProblemError(f"heads={heads} must divide features={features}")
        self.features, self.heads, self.causal = features, heads, causal
        hidden = 4 * features if hidden is None else hidden
        self.project, self.gather = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.feed_forward = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))
        self.norm_input, self.norm_attention, self.norm_output = (nn.LayerNorm(features) for _ in range(3))
        # Dropout with probability 0 would draw masks nevertheless.
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """The next state, ``(batch, length, features)``."""
        if x.dim() < 2 or x.shape[-1] != self.features:
            raise ProblemError(f"x must be (batch, length, {self.features}), got shape {tuple(x.shape)}")
        h = z + self.norm_input(x)
        a = self.norm_attention(h + self.dropout(self._attention(h)))
        value: Tensor = self.norm_output(a + self.dropout(self.feed_forward(a)))
        return value

    def extra_repr(self) -> str:
        return f"features={self.features}, heads={self.heads}, causal={self.causal}"

    def _attention(self, h: Tensor) -> Tensor:
        q, k, v = (self._split(part) for part in self.project(h).chunk(3, dim=-1))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.causal:
            length = h.shape[-2]
            future = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        attended = torch.softmax(scores, dim=-1) @ v
        return self.gather(attended.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]

    def _split(self, t: Tensor) -> Tensor:
        """``(..., length, features)`` as ``(..., heads, length, features / heads)``."""
        return t.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # type: ignore[no-any-return]
