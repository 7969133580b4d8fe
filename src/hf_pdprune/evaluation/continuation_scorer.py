"""ContinuationScorer: log-likelihoods of continuations, the context read by prefill, the continuation by decode."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ..inference import DecodeStage, PrefillStage
from ..inference.stage import position_ids
from ..kv import KVPayload, TokenAwareCache
from ..pair_layout import check_first_token


class Score(NamedTuple):
    """
    What a pair of stages says about one continuation.

    Args:
        index (`int`): Which request it answers.
        log_likelihood (`float`): Sum of the log-probabilities of its tokens, in nats.
        is_greedy (`bool`): Whether each token is the most likely one.
    """

    index: int
    log_likelihood: float
    is_greedy: bool


class ContinuationScorer:
    """
    Scores continuations the way a pair of stages is deployed: prefill reads the context and predicts the first token
    of the continuation, unless that is left to decode, which predicts the others on the KV entries that the plan hands
    over.

    A context that several continuations share (the answers of a multiple choice) is read once. Contexts of about equal
    length are read together, and continuations of about equal length scored together.

    Args:
        prefill ([`PrefillStage`]): Reads the contexts.
        decode ([`DecodeStage`]): Scores the continuations from their second token on.
        batch_size (`int`, defaults to 8): Contexts, and then continuations, per forward.
        pad_token_id (`int`, defaults to 0): Fills up rows; masked everywhere.
        first_token (`str`, defaults to `"prefill"`): Which stage predicts the first token of a continuation. For
            `"decode"` it reads the last token of the context; one of a single token is prefill's all the same.

    Example:

    ```python
    scorer = ContinuationScorer(*load_stages("outputs/demo"), batch_size=16)
    scores = sorted(scorer.score([(context_ids, answer_ids) for answer_ids in answers]))
    best = max(scores, key=lambda score: score.log_likelihood).index
    ```
    """

    def __init__(
        self,
        prefill: PrefillStage,
        decode: DecodeStage,
        batch_size: int = 8,
        pad_token_id: int = 0,
        first_token: str = "prefill",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        check_first_token(first_token)
        self.first_token = first_token
        self.prefill = prefill
        self.decode = decode
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id

    @torch.no_grad()
    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Score]:
        """
        Yields the scores as they are ready, in no particular order.

        Args:
            requests (`Sequence[tuple]`): Token ids of context and continuation; neither may be empty.

        Raises:
            `ValueError`: If a context or a continuation is empty.
        """
        continuations: dict[tuple[int, ...], list[int]] = {}
        all_texts: list[Sequence[int]] = []
        begins: list[int] = []  # where in its text the continuation begins: after what decode reads of the context
        for index, (context, continuation) in enumerate(requests):
            if not context or not continuation:
                what = "continuation" if context else "context"
                raise ValueError(f"request {index} has an empty {what}")
            begins.append(int(self.first_token == "decode" and len(context) > 1))
            if begins[index]:
                context, continuation = context[:-1], [context[-1], *continuation]
            all_texts.append(continuation)
            continuations.setdefault(tuple(context), []).append(index)
        # The longest come first: what does not fit into memory shows at once.
        contexts = sorted(continuations, key=lambda context: (-len(context), context))
        for begin in range(0, len(contexts), self.batch_size):
            batch = contexts[begin : begin + self.batch_size]
            payload = self.prefill.forward(*self._padded(batch, self.prefill, "left"))
            first_log_probs = payload.first_logits.float().log_softmax(dim=-1)
            payload.check_model(self.decode.fingerprint)
            payload = payload.prompt_to(self.decode.model.device)
            rows = [(row, index) for row, context in enumerate(batch) for index in continuations[context]]
            longer = [(row, index) for row, index in rows if len(all_texts[index]) > 1]
            for row, index in rows:
                if len(all_texts[index]) == 1:
                    yield _score(index, first_log_probs[row, None], all_texts[index])
            longer.sort(key=lambda pair: -len(all_texts[pair[1]]))
            for start in range(0, len(longer), self.batch_size):
                part = longer[start : start + self.batch_size]
                texts = [all_texts[index] for _, index in part]
                logits = self._decode(payload, [row for row, _ in part], texts)
                for (row, index), text, rest in zip(part, texts, logits, strict=True):
                    first = first_log_probs[row, None].to(rest.device)
                    log_probs = torch.cat([first, rest[: len(text) - 1].float().log_softmax(dim=-1)])
                    yield _score(index, log_probs[begins[index] :], text[begins[index] :])

    @torch.no_grad()
    def score_windows(
        self, windows: Sequence[tuple[Sequence[int], Sequence[int]]], prompt_share: float = 0.5
    ) -> Iterator[Score]:
        """
        Scores stretches of text that have no prompt of their own (rolling log-likelihoods): of each, the first part is
        read, and predicted, by prefill, and the rest by decode on what prefill hands over.

        Args:
            windows (`Sequence[tuple]`): Token ids of what is only read, and of what is scored; neither may be empty.
            prompt_share (`float`, defaults to 0.5): Share of the scored tokens that belong to the prompt, below 1. At
                0 all but the first one are decode's.
        """
        if not 0 <= prompt_share < 1:
            raise ValueError(f"prompt_share must be at least 0 and less than 1, got {prompt_share}")
        cuts = [int(prompt_share * len(scored)) for _, scored in windows]
        requests = [([*read, *scored[:cut]], scored[cut:]) for (read, scored), cut in zip(windows, cuts, strict=True)]
        in_prompts = {index: (total, greedy) for index, total, greedy in self._score_prompts(windows, requests)}
        for index, total, greedy in self.score(requests):
            more, also_greedy = in_prompts.get(index, (0.0, True))
            yield Score(index, total + more, greedy and also_greedy)

    def _score_prompts(self, windows: Sequence[tuple], requests: Sequence[tuple]) -> Iterator[Score]:
        """What prefill says about the tokens of prompts that are scored."""
        scored = [len(prompt) - len(read) for (read, _), (prompt, _) in zip(windows, requests, strict=True)]
        order = sorted((index for index, count in enumerate(scored) if count), key=lambda i: -len(requests[i][0]))
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            ids, mask = self._padded([requests[index][0][:-1] for index in batch], self.prefill, "left")
            with self.prefill.active():
                logits = self.prefill.module(
                    input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
                ).logits
            for index, row in zip(batch, logits, strict=True):
                text = requests[index][0][-scored[index] :]
                yield _score(index, row[-len(text) :].float().log_softmax(dim=-1), text)

    def _decode(self, payload: KVPayload, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> torch.FloatTensor:
        """Decode's logits after each token but the last of `texts`, which continue the given rows of the payload."""
        stage = self.decode
        ids, mask = self._padded([text[:-1] for text in texts], stage, "right")
        row_ids = torch.tensor(rows, device=stage.model.device)
        whole_mask = torch.cat([payload.prompt_mask[row_ids], mask], dim=1)
        with (
            stage.active(),
            TokenAwareCache.from_payload(payload, stage.plan, stage.model, stage.running_blocks) as cache,
        ):
            cache.batch_select_indices(row_ids)
            return stage.module(
                input_ids=ids,
                attention_mask=whole_mask,
                position_ids=position_ids(whole_mask)[:, payload.prompt_tokens :],
                past_key_values=cache,
                use_cache=True,
            ).logits

    def _padded(
        self, rows: Sequence[Sequence[int]], stage: PrefillStage | DecodeStage, side: str
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Token ids and mask of rows of tokens, padded on one side, on the stage's device."""
        ids = pad_sequence([torch.tensor(row) for row in rows], True, self.pad_token_id, padding_side=side)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, padding_side=side)
        return ids.to(stage.model.device), mask.to(stage.model.device)


def _score(index: int, log_probs: torch.FloatTensor, text: Sequence[int]) -> Score:
    """`log_probs` have the shape `(len(text), vocab_size)`."""
    tokens = torch.tensor(list(text), device=log_probs.device)
    chosen = log_probs.gather(-1, tokens[:, None])
    return Score(index, float(chosen.sum()), bool((log_probs.argmax(dim=-1) == tokens).all()))
