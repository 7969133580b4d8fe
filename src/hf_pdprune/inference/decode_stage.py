"""DecodeStage: KVPayload -> generated tokens."""

from functools import partial
from typing import Any

import torch
from transformers import Cache, GenerationConfig

from ..kv import KVPayload, PayloadError, StaticDecodeCache, TokenAwareCache
from ..shortened_config import context_length
from .continued_generation import continued_settings, ends_with_first_token
from .stage import Stage, position_ids


class DecodeStage(Stage):
    """
    Goes on where prefill handed over: `model.generate` on a [`TokenAwareCache`] made from the payload.

    Example:

    ```python
    decode = DecodeStage(AutoModelForCausalLM.from_pretrained("outputs/demo/decode"), plan)
    sequences = decode.generate(KVPayload.from_bytes(wire), max_new_tokens=64)
    ```

    Args:
        args: As for [`Stage`].
        static_shapes (`bool`, defaults to `False`): Whether `generate` runs on a [`StaticDecodeCache`], so that its
            steps can be compiled. On accelerators `generate` does that by itself. The cache is kept, with its memory,
            for the next prompts of as many rows: one thread at a time may generate.
        kwargs: As for [`Stage`].
    """

    name = "decode"

    def __init__(self, *args: Any, static_shapes: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.static_shapes = static_shapes
        self._static_cache: StaticDecodeCache | None = None  # kept for the next prompts of about the same shape

    @torch.no_grad()
    def generate(self, payload: KVPayload, **generate_kwargs: Any) -> torch.LongTensor:
        """
        Args:
            payload ([`KVPayload`]): What prefill handed over, the first token or the prompt's last one included.
            generate_kwargs: As for `model.generate`. A first token that prefill generated counts as one of
                `max_new_tokens`, and all beams and returned sequences of a prompt begin with it.

        Returns:
            `torch.LongTensor`: Shape `(batch_size * num_return_sequences, prompt_tokens + new tokens)`, as
            `model.generate` returns it.

        Raises:
            `PayloadError`: If the payload is of another plan or of another pair of stages, or has no token to go on
            from.
            `ValueError`: If `generate_kwargs` leave nothing to generate, or ask for what a hand-over cannot do.
        """
        payload.check_model(self.fingerprint)
        if payload.first_token is None and payload.last_token is None:
            raise PayloadError("the payload has no first token: it was made for teacher forcing")
        self.check_generation_settings(generate_kwargs, generates_first=payload.first_token is not None)
        payload = payload.prompt_to(self.model.device)
        if payload.first_token is None:
            return self._generate_all(payload, generate_kwargs)

        setting = partial(self.generation_setting, generate_kwargs)
        sequences = torch.cat([payload.prompt_ids, payload.first_token], dim=1)
        mask = torch.cat([payload.prompt_mask, torch.ones_like(payload.first_token)], dim=1)
        returned = setting("num_return_sequences") or 1
        copies = max(returned, setting("num_beams") or 1)
        more_tokens = self._max_new_tokens(payload.prompt_tokens, generate_kwargs) - 1
        streamer = generate_kwargs.get("streamer")
        # Rows that ended with the first token stay out: generate would take it for a part of the prompt and go on.
        goes_on = ~ends_with_first_token(sequences, setting)
        generate_kwargs |= continued_settings(setting, goes_on.nonzero()[:, 0])
        generate_kwargs |= {"max_new_tokens": more_tokens, "max_length": None, "return_dict_in_generate": False}
        generated = sequences[goes_on].repeat_interleave(returned, dim=0)
        if more_tokens > 0 and goes_on.any():
            with self.active():
                with TokenAwareCache.from_payload(payload, self.plan, self.model, self.running_blocks) as cache:
                    if not goes_on.all():
                        cache.batch_select_indices(goes_on.nonzero()[:, 0])
                    if copies > 1:
                        cache.batch_repeat_interleave(copies)
                    generated = self.model.generate(
                        input_ids=sequences[goes_on],
                        attention_mask=mask[goes_on],
                        past_key_values=self._shaped(cache, more_tokens),
                        **generate_kwargs,
                    )
        elif streamer is not None:
            streamer.put(sequences.cpu())
            streamer.end()
        if goes_on.all():
            return generated
        eos, pad = setting("eos_token_id"), setting("pad_token_id")
        filler = pad if pad is not None else eos[0] if isinstance(eos, list) else eos  # as model.generate fills rows
        # Without an end-of-sequence token all rows end together, and none is filled up.
        result = sequences.new_full((len(sequences) * returned, generated.shape[1]), filler or 0)
        result[:, : sequences.shape[1]] = sequences.repeat_interleave(returned, dim=0)
        result[goes_on.repeat_interleave(returned)] = generated
        return result

    def _generate_all(self, payload: KVPayload, generate_kwargs: dict[str, Any]) -> torch.LongTensor:
        """Decode reads the prompt's last token and generates the first one too: what `model.generate` does."""
        returned = self.generation_setting(generate_kwargs, "num_return_sequences") or 1
        copies = max(returned, self.generation_setting(generate_kwargs, "num_beams") or 1)
        with self.active():
            with TokenAwareCache.from_payload(payload, self.plan, self.model, self.running_blocks) as cache:
                if copies > 1:
                    cache.batch_repeat_interleave(copies)
                more_tokens = self._max_new_tokens(payload.prompt_tokens + 1, generate_kwargs)
                return self.model.generate(
                    input_ids=torch.cat([payload.prompt_ids, payload.last_token], dim=1),
                    attention_mask=torch.cat([payload.prompt_mask, torch.ones_like(payload.last_token)], dim=1),
                    past_key_values=self._shaped(cache, more_tokens),
                    **generate_kwargs | {"return_dict_in_generate": False},
                )

    def _shaped(self, cache: TokenAwareCache, more_tokens: int) -> Cache:
        """What `generate` runs on, with room for what it reads: the last token that is there, and all but the last."""
        if not self.static_shapes:
            return cache
        if self._static_cache is not None and self._static_cache.has_room_for(cache, more_tokens):
            self._static_cache.fill(cache)
        else:
            if self._static_cache is not None:  # gone before there is another one
                self._static_cache.close()
                self._static_cache = None
            self._static_cache = StaticDecodeCache(cache, self.model, more_tokens)
        return self._static_cache

    def _max_new_tokens(self, prompt_tokens: int, generate_kwargs: dict[str, Any]) -> int:
        """How many tokens `model.generate` would add to the prompt. Raises a `ValueError` if there are none."""
        max_new_tokens = self.generation_setting(generate_kwargs, "max_new_tokens")
        max_length = self.generation_setting(generate_kwargs, "max_length")
        if max_new_tokens is None and max_length is None:
            default = GenerationConfig._get_default_generation_params()["max_length"]
            context = context_length(self.model.config)
            max_new_tokens = default if context is None else min(default, context - prompt_tokens)
        elif max_new_tokens is None:
            max_new_tokens = max_length - prompt_tokens
        if max_new_tokens < 1:
            raise ValueError(f"a prompt of {prompt_tokens} tokens leaves {max_new_tokens} tokens to generate")
        return max_new_tokens

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

        Raises:
            `PayloadError`: If the payload is of another plan or of another pair of stages.
        """
        payload.check_model(self.fingerprint)
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
