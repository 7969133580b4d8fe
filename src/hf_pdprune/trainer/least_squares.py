"""LeastSquares: ridge regression from sums of products, with the ridge that serves held-out rows best."""

import torch


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
    Finds D with features @ D near to targets: D = (A'A + ridge)^-1 (A'R). Only sums of products are kept, so memory
    does not grow with the text. The ridge, a share of the mean square of the features, is the one of a few with which
    the rows held out (every fifth) are explained best by the others; the result then uses all rows.
    """

    def __init__(self):
        self.rows = 0
        self.sums: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

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
                a, r = features[chosen].flatten(0, 1), targets[chosen].flatten(0, 1)
                gram, cross = self.sums.get(held_out, (0.0, 0.0))
                self.sums[held_out] = (gram + a.T @ a, cross + a.T @ r)

    def totals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A'A, shape `(num_features, num_features)`, and A'R, shape `(num_features, hidden_size)`, of all rows."""
        return tuple(sum(part) for part in zip(*self.sums.values(), strict=True))

    def ridge(self) -> float:
        """The ridge that serves held-out rows best, to be added to the diagonal of A'A of all rows."""
        gram, _ = self.totals()
        share = _DEFAULT_RIDGE
        if len(self.sums) == 2:
            own, cross = self.sums[False]
            held_gram, held_cross = self.sums[True]

            def error(share: float) -> float:  # on held-out rows, but for a constant
                solution = _solve(own, cross, share * own.diagonal().mean())
                return (solution * (held_gram @ solution - 2 * held_cross)).sum().item()

            share = min(_RIDGES, key=error)
        return share * gram.diagonal().mean().item()

    def reduced_rank(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The solution of at most `rank` that is best on these rows: the full one, projected on the leading eigenvectors
        of D'(A'A)D (Izenman 1975).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Factors of shapes `(rank, num_features)` and `(hidden_size, rank)`,
            where a rank beyond the hidden size is the hidden size.
        """
        gram, cross = self.totals()
        solution = _solve(gram, cross, self.ridge())
        leading = torch.linalg.eigh((solution.T @ gram @ solution).double()).eigenvectors[:, -rank:].to(solution.dtype)
        return (solution @ leading).T, leading

    def best_features(self, prior: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Chooses features and solves for them. The targets that were added are what is missing when every feature counts
        as `prior` says; the ridge pulls towards `prior`.

        Features are left out in rounds. Leaving out one of them costs |d|^2 / (A'A + ridge)^-1_jj, the others making
        up for it as well as they can (optimal brain surgeon, Hassibi and Stork 1993).

        Args:
            prior (`torch.Tensor`): Shape `(num_features, hidden_size)`.
            count (`int`): Number of features to keep.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The chosen features in their order, shape `(count,)`, and what each
            counts, shape `(count, hidden_size)`.
        """
        gram, cross = self.totals()
        ridge = self.ridge()
        cross = cross + gram @ prior
        chosen = torch.arange(len(gram), device=gram.device)
        while len(chosen) > count:
            inverse = torch.cholesky_inverse(_cholesky(gram[chosen][:, chosen], ridge))
            solution = inverse @ (cross[chosen] + ridge * prior[chosen])
            cost = solution.pow(2).sum(-1) / inverse.diagonal()
            kept = cost.topk(max(count, int(_KEPT_PER_ROUND * len(chosen)))).indices
            chosen = chosen[kept.sort().values]
        return chosen, _solve(gram[chosen][:, chosen], cross[chosen] + ridge * prior[chosen], ridge)


def _cholesky(gram: torch.Tensor, ridge: float | torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def _solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float | torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(cross, _cholesky(gram, ridge))
