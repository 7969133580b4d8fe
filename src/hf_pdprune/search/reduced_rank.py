"""Reduced-rank regression with a ridge, from sums that are gathered batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


# In so many strips A'A is computed: more would save more of its second half, but are narrower than products like.
_GRAM_PARTS = 6


@dataclass
class Sums:
    """
    What a linear regression of targets R on features A needs to know of them.

    Args:
        gram (`torch.Tensor`): A'A, shape `(in_features, in_features)`.
        cross (`torch.Tensor`): A'R, shape `(in_features, out_features)`.
        squares (`float`): Sum of the squares of R.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    squares: float

    @classmethod
    def of(cls, features: torch.Tensor, targets: torch.Tensor) -> "Sums":
        """Of features `(num_tokens, in_features)` and targets `(num_tokens, out_features)`."""
        return cls(_gram(features), features.T @ targets, float(targets.double().pow(2).sum()))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.gram + other.gram, self.cross + other.cross, self.squares + other.squares)

    def after(self, weight: torch.Tensor) -> "Sums":
        """Of the same features, and of what A @ weight leaves of the targets."""
        through = self.gram @ weight
        explained = float((weight * (2 * self.cross - through)).sum(dtype=torch.float64))
        return Sums(self.gram, self.cross - through, max(0.0, self.squares - explained))

    def left_by(self, weight: torch.Tensor) -> float:
        """The part of the squares of R that R - A @ weight has left."""
        if not self.squares:
            return 0.0
        explained = 2 * (self.cross * weight).sum() - (weight * (self.gram @ weight)).sum()
        return 1 - float(explained) / self.squares


def _gram(features: torch.Tensor) -> torch.Tensor:
    """A'A, of which only one of the two halves that mirror each other is computed."""
    parts = features.tensor_split(max(1, min(_GRAM_PARTS, features.shape[1] // _GRAM_PARTS)), dim=1)
    gram = features.new_empty(features.shape[1], features.shape[1])
    begin = 0
    for part in parts:
        end = begin + part.shape[1]
        gram[begin:, begin:end] = features[:, begin:].T @ part
        gram[begin:end, end:] = gram[end:, begin:end].T
        begin = end
    return gram


def ridge_regression(sums: Sums, ridge: float) -> torch.Tensor:
    """
    The weight D = (A'A + ridge * mean of the diagonal)^-1 A'R.

    Args:
        sums ([`Sums`]): Of features and targets.
        ridge (`float`): As a share of the mean of A'A's diagonal.

    Returns:
        `torch.Tensor`: Shape `(in_features, out_features)`.
    """
    regularised = sums.gram.clone()
    regularised.diagonal().add_(ridge * float(sums.gram.diagonal().mean()))
    return torch.cholesky_solve(sums.cross, torch.linalg.cholesky(regularised))


def best_ridge(fitted: Sums, held_out: Sums, ridges: Sequence[float]) -> tuple[float, float]:
    """The ridge whose fit on `fitted` leaves least of `held_out`, and the part that it leaves."""
    left = {ridge: held_out.left_by(ridge_regression(fitted, ridge)) for ridge in ridges}
    ridge = min(left, key=left.__getitem__)
    return ridge, left[ridge]


def reduced_rank(sums: Sums, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The factors of the best approximation of `weight` of a given rank on the features: it keeps the leading
    eigenvectors of D'(A'A)D (reduced-rank regression, Izenman 1975).

    Returns:
        `down` of shape `(rank, in_features)` and `up` of shape `(out_features, rank)`, as the two matrices of a LoRA,
        of about one size so that gradients of both are too.
    """
    leading = torch.linalg.eigh(weight.T @ sums.gram @ weight).eigenvectors[:, -rank:]
    down = (weight @ leading).T
    balance = (down.norm() / leading.norm()).sqrt() if bool(down.any()) else torch.ones_like(down.sum())
    return down / balance, leading * balance
