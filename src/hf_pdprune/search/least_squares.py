"""LeastSquares: the regression that local distillation solves, its ridge chosen on held-out rows."""

import torch

from .reduced_rank import Sums, best_ridge, reduced_rank, ridge_regression


# Ridges that are tried, relative to the mean of the features' squares.
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
# Where there is too little text to hold any out.
_DEFAULT_RIDGE = 0.3
# Every so manieth row is held out.
_HELD_OUT = 5
# Part of the features that is kept in each round of leaving some out.
_KEPT_PER_ROUND = 0.8


class LeastSquares:
    """
    Finds what brings features nearest to targets. Only sums of products are kept, so memory does not grow with the
    text. The ridge is the one of a few with which the rows held out (every fifth) are explained best by the others;
    results then use all rows.
    """

    def __init__(self):
        self.rows = 0
        self.sums: dict[bool, Sums] = {}

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """
        Adds some rows of text.

        Args:
            features (`torch.Tensor`): Shape `(batch_size, seq_len, num_features)`, in float32.
            targets (`torch.Tensor`): Shape `(batch_size, seq_len, hidden_size)`, in float32.
        """
        numbers = torch.arange(self.rows, self.rows + len(features)) % _HELD_OUT
        self.rows += len(features)
        for held_out in (False, True):
            chosen = (numbers == _HELD_OUT - 1) == held_out
            if chosen.any():
                more = Sums.of(features[chosen].flatten(0, 1), targets[chosen].flatten(0, 1))
                self.sums[held_out] = self.sums[held_out] + more if held_out in self.sums else more

    def totals(self) -> Sums:
        """The sums of all rows."""
        first, *others = self.sums.values()
        return first + others[0] if others else first

    def restricted(self, chosen: torch.LongTensor) -> "LeastSquares":
        """The same rows with the `chosen` features only."""
        fewer = LeastSquares()
        fewer.rows = self.rows
        fewer.sums = {
            part: Sums(sums.gram[chosen][:, chosen], sums.cross[chosen], sums.squares)
            for part, sums in self.sums.items()
        }
        return fewer

    def ridge(self, prior: torch.Tensor | None = None) -> float:
        """
        The ridge that serves held-out rows best, as a share of the mean of the features' squares.

        Args:
            prior (`torch.Tensor`, *optional*): To what it pulls, shape `(num_features, hidden_size)`. Default: zero.
        """
        if len(self.sums) < 2:
            return _DEFAULT_RIDGE
        fitted, held_out = (self.sums[part] if prior is None else self.sums[part].after(prior) for part in (0, 1))
        return best_ridge(fitted, held_out, _RIDGES)[0]

    def squared_error(self, weight: torch.Tensor) -> float:
        """What all rows' targets less features @ weight have in squares."""
        return self.totals().after(weight).squares

    def reduced_rank(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of the best solution of a given rank, see [`~search.reduced_rank.reduced_rank`]."""
        sums = self.totals()
        return reduced_rank(sums, ridge_regression(sums, self.ridge()), rank)

    def best_features(self, prior: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Chooses features and solves for them; the ridge pulls towards `prior`.

        Features are left out in rounds. Leaving out one of them costs |d|^2 / (A'A + ridge)^-1_jj, the others making
        up for it as well as they can (optimal brain surgeon, Hassibi and Stork 1993).

        Args:
            prior (`torch.Tensor`): Shape `(num_features, hidden_size)`.
            count (`int`): Number of features to keep.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The chosen features in their order, shape `(count,)`, and what each
            counts, shape `(count, hidden_size)`.
        """
        sums = self.totals()
        ridge = self.ridge(prior) * float(sums.gram.diagonal().mean())
        wanted = sums.cross + ridge * prior
        chosen = torch.arange(len(prior), device=prior.device)
        while len(chosen) > count:
            factor = _cholesky(sums.gram[chosen][:, chosen], ridge)
            # The inverse's diagonal from the triangular factor's inverse: cholesky_inverse takes 20 times as long.
            identity = torch.eye(len(chosen), dtype=factor.dtype, device=factor.device)
            diagonal = torch.linalg.solve_triangular(factor, identity, upper=False).pow(2).sum(0)
            cost = torch.cholesky_solve(wanted[chosen], factor).pow(2).sum(-1) / diagonal
            kept = cost.topk(max(count, int(_KEPT_PER_ROUND * len(chosen)))).indices
            chosen = chosen[kept.sort().values]
        return chosen, torch.cholesky_solve(wanted[chosen], _cholesky(sums.gram[chosen][:, chosen], ridge))


def _cholesky(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    return torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
