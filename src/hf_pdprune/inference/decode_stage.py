"""DecodeStage: KVPayload -> generated tokens."""

from typing import Any

import torch

from ..kv import KVPayload, TokenAwareCache
from .stage import Stage, position_ids


class DecodeStage(Stage):
    """
    Goes on where prefill handed over: `model.generate` on a [`TokenAwareCache`] made from the payload.

    Example:

    ```python
    decode = DecodeStage(AutoModelForCausalLM.from_pretrained("outputs/demo/decode"), plan)
    sequences = decode.generate(KVPayload.from_bytes(wire), max_new_tokens=64)
    ```
    """

    name = "decode"

    @torch.no_grad()
    def generate(self, payload: KVPayload, **generate_kwargs: Any) -> torch.LongTensor:
        """
        Args:
            payload ([`KVPayload`]): What prefill handed over, the first token included. Its tensors may be changed.
            generate_kwargs: As for `model.generate`. The first token counts as one of `max_new_tokens`.

        Returns:
            `torch.LongTensor`: Shape `(batch_size, prompt_tokens + new tokens)`, as `model.generate` returns it.

        Raises:
            `PayloadError`: If the payload is of another plan or of another pair of stages.
        """
        payload.check_model(self.fingerprint)
        payload = payload.to(self.model.device)
        config = generate_kwargs.get("generation_config") or self.model.generation_config

        def setting(name: str) -> Any:
            return generate_kwargs[name] if generate_kwargs.get(name) is not None else getattr(config, name)

        for name in ("max_new_tokens", "min_new_tokens"):  # the first token is one of them
            if setting(name) is not None:
                generate_kwargs[name] = setting(name) - 1
        sequences = torch.cat([payload.prompt_ids, payload.first_token], dim=1)
        ended = _is_any_of(payload.first_token, setting("eos_token_id"))
        if ended.all() or generate_kwargs.get("max_new_tokens") == 0:
            return sequences
        mask = torch.cat([payload.prompt_mask, torch.ones_like(payload.first_token)], dim=1)
        with self.active():
            with TokenAwareCache.from_payload(payload, self.plan, self.model, self.running_blocks) as cache:
                generated = self.model.generate(
                    input_ids=sequences,
                    attention_mask=mask,
                    past_key_values=cache,
                    **generate_kwargs,
                )
        # Rows that ended with the first token: generate took it for a part of the prompt and went on.
        generated[ended, sequences.shape[1] :] = _padding_token(setting("pad_token_id"), setting("eos_token_id"))
        return generated

    def forward(
        self, payload: KVPayload, completion_ids: torch.LongTensor, completion_mask: torch.Tensor
    ) -> torch.FloatTensor:
        """
        The decode half of the disaggregated forward: teacher-forced and differentiable.

        Args:
            payload ([`KVPayload`]): What prefill handed over.
            completion_ids (`torch.LongTensor`): Shape `(batch_size, completion_tokens)`, padded right.
            completion_mask (`torch.Tensor`): Shape `(batch_size, completion_tokens)`, 0 for padding.

        Returns:
            `torch.FloatTensor`: Logits of the token after each completion token,
            shape `(batch_size, completion_tokens, vocab_size)`.
        """
        mask = torch.cat([payload.prompt_mask, completion_mask], dim=1)
        with self.active():
            with TokenAwareCache.from_payload(payload, self.plan, self.model, self.running_blocks) as cache:
                output = self.module(
                    input_ids=completion_ids,
                    attention_mask=mask,
                    position_ids=position_ids(mask)[:, payload.prompt_tokens :],
                    past_key_values=cache,
                    use_cache=True,
                )
        return output.logits


def _is_any_of(tokens: torch.Tensor, ids: int | list[int] | None) -> torch.Tensor:
    """Which rows of `tokens` (batch_size, 1) are one of `ids`."""
    wanted = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return torch.isin(tokens[:, 0], torch.tensor(wanted, device=tokens.device, dtype=tokens.dtype))


def _padding_token(pad: int | None, eos: int | list[int]) -> int:
    """What `model.generate` fills ended rows with."""
    return pad if pad is not None else eos[0] if isinstance(eos, list) else eos
