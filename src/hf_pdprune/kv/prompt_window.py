"""PromptWindow: which prompt tokens a token-aware block keeps. Pure tensor maths."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PromptWindow:
    """
    The columns of a (padded) prompt that a token-aware block keeps: of every row the first and the last real tokens.

    Args:
        prompt_tokens (`int`): Length of the padded prompt.
        columns (`torch.LongTensor`): Kept columns, rising: of shape `(kept_tokens,)` where all rows keep the same,
            else `(batch_size, kept_tokens)`. A row with fewer real tokens than the others keep is filled up with
            columns of its padding, which the attention mask hides anyway.
    """

    prompt_tokens: int
    columns: torch.LongTensor

    @classmethod
    def of_prompt(
        cls, prompt_tokens: int, padding_mask: torch.Tensor | None, first_tokens: int, last_tokens: int
    ) -> "PromptWindow | None":
        """
        The window of a batch of prompts, or `None` if it keeps every column.

        Args:
            prompt_tokens (`int`): Length of the padded prompts.
            padding_mask (`torch.Tensor`, *optional*): Shape `(batch_size, prompt_tokens)`, 0 for padding.
            first_tokens (`int`): Real tokens that each row keeps at its beginning.
            last_tokens (`int`): Real tokens that each row keeps at its end; an overlap counts once.
        """
        if padding_mask is None or bool(padding_mask.bool().all()):
            if prompt_tokens <= first_tokens + last_tokens:
                return None
            device = None if padding_mask is None else padding_mask.device
            first = torch.arange(first_tokens, device=device)
            last = torch.arange(prompt_tokens - last_tokens, prompt_tokens, device=device)
            return cls(prompt_tokens, torch.cat([first, last]))
        real = padding_mask.bool()
        rank = real.cumsum(dim=-1) - 1  # place of each real token among its row's
        length = real.sum(dim=-1, keepdim=True)
        kept = real & ((rank < first_tokens) | (rank >= length - last_tokens))
        width = int(kept.sum(dim=-1).max())
        if width == prompt_tokens:
            return None
        # A stable sort on "not kept" puts the kept columns first, then (padding) columns to fill up shorter rows.
        columns = (~kept).int().argsort(dim=-1, stable=True)[:, :width]
        return cls(prompt_tokens, columns.sort(dim=-1).values)

    @property
    def kept_tokens(self) -> int:
        """Columns that are kept of each row."""
        return self.columns.shape[-1]

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """
        Keys or values without the dropped prompt columns, as a tensor of its own.

        Args:
            states (`torch.Tensor`): Shape `(batch_size, num_heads, tokens, head_dim)`, the prompt first.
        """
        columns = self._columns_of(states.shape[-2], states.device)
        if columns.dim() == 1:
            return states.index_select(-2, columns)
        batch_size, num_heads, _, head_dim = states.shape
        return states.gather(-2, columns[:, None, :, None].expand(batch_size, num_heads, -1, head_dim))

    def select_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """
        An attention mask without the dropped columns.

        Args:
            mask (`torch.Tensor`): Shape `(batch_size or 1, num_heads or 1, query_length, tokens)`, or the 2D
                `(batch_size, tokens)` of flash attention.
        """
        columns = self._columns_of(mask.shape[-1], mask.device)
        if columns.dim() == 1:
            return mask.index_select(-1, columns)
        batch_size = columns.shape[0]
        columns = columns.view(batch_size, *(1,) * (mask.dim() - 2), -1)
        return mask.expand(batch_size, *mask.shape[1:]).gather(-1, columns.expand(-1, *mask.shape[1:-1], -1))

    def hide_dropped(self, mask: torch.Tensor | None, first_query: int, queries: int) -> torch.Tensor:
        """
        An attention mask over all columns in which the queries after the prompt do not see the dropped ones.

        Args:
            mask (`torch.Tensor`, *optional*): Boolean or additive, of shape
                `(batch_size or 1, num_heads or 1, queries, tokens)`; `None` for a causal mask.
            first_query (`int`): Position of the first query.
            queries (`int`): Their number; the last one is the last of `tokens`.
        """
        device = self.columns.device if mask is None else mask.device
        tokens = first_query + queries
        if mask is None:
            mask = torch.ones((1, 1, queries, tokens), dtype=torch.bool, device=device).tril(first_query)
        columns = torch.atleast_2d(self.columns.to(device))
        dropped = torch.arange(tokens, device=device).lt(self.prompt_tokens).repeat(len(columns), 1)
        dropped = dropped.scatter(-1, columns, False)[:, None, None, :]
        after_prompt = torch.arange(first_query, tokens, device=device).ge(self.prompt_tokens)
        hidden = dropped & after_prompt[:, None]
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    def index_rows(self, rows: torch.Tensor) -> "PromptWindow":
        """The window of the given rows (beam search reorders, repeats and drops rows)."""
        if self.columns.dim() == 1:
            return self
        return PromptWindow(self.prompt_tokens, self.columns[rows.to(self.columns.device)])

    def _columns_of(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Kept columns among `tokens` columns, of which everything after the prompt is kept."""
        columns = self.columns.to(device)
        if tokens == self.prompt_tokens:  # as where the prompt is cut, keys and values of every block
            return columns
        since = torch.arange(self.prompt_tokens, tokens, device=device)
        return torch.cat([columns, since.expand(*columns.shape[:-1], -1)], dim=-1)
