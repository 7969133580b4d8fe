"""PrefillStage: prompts -> KVPayload."""

from typing import Any

import torch

from ..kv import KVPayload, TokenAwareCache
from .stage import Stage, position_ids


class PrefillStage(Stage):
    """
    Reads prompts, generates the first token, and hands over the KV entries that the plan selects.

    Example:

    ```python
    prefill = PrefillStage(AutoModelForCausalLM.from_pretrained("outputs/demo/prefill"), plan)
    payload = prefill(**tokenizer(["The capital of France is"], return_tensors="pt"))
    wire = payload.to_bytes()
    ```
    """

    name = "prefill"

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        return_log_probs: bool = False,
        **generate_kwargs: Any,
    ) -> KVPayload:
        """
        Args:
            input_ids (`torch.LongTensor`): Shape `(batch_size, prompt_tokens)`, padded left.
            attention_mask (`torch.Tensor`, *optional*): Shape `(batch_size, prompt_tokens)`, 0 for padding.
            return_log_probs (`bool`, defaults to `False`): Whether the payload carries the first token's
                log-probabilities.
            generate_kwargs: As for `model.generate` (`do_sample`, `temperature`, ...). How many tokens, beams and
                sequences there will be is up to decode.

        Raises:
            `ValueError`: If a prompt is longer than the model's context.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_length(input_ids.shape[1])
        least = self.generation_setting(generate_kwargs, "min_new_tokens")
        if least is None:
            least = (self.generation_setting(generate_kwargs, "min_length") or 0) - input_ids.shape[1]
        generate_kwargs |= {"max_new_tokens": 1, "min_new_tokens": 1 if least > 0 else None}
        generate_kwargs |= {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True}
        for name in ("max_length", "min_length", "streamer", "assistant_model", "prompt_lookup_num_tokens"):
            generate_kwargs[name] = None
        with self.active(), self._new_cache(input_ids) as cache:
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                output_logits=return_log_probs,
                **generate_kwargs,
            )
        first = {"first_token": output.sequences[:, input_ids.shape[1] :]}
        if return_log_probs:
            first["first_log_probs"] = output.logits[0].float().log_softmax(dim=-1)
        return KVPayload.from_cache(cache, input_ids, attention_mask, self.fingerprint, **first)

    def forward(self, prompt_ids: torch.LongTensor, prompt_mask: torch.Tensor) -> KVPayload:
        """
        The prefill half of the disaggregated forward: differentiable, with the logits of the first completion token in
        `payload.first_logits`.

        Args:
            prompt_ids (`torch.LongTensor`): Shape `(batch_size, prompt_tokens)`, padded left.
            prompt_mask (`torch.Tensor`): Shape `(batch_size, prompt_tokens)`, 0 for padding.
        """
        with self.active(), self._new_cache(prompt_ids) as cache:
            output = self.module(
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                position_ids=position_ids(prompt_mask),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        first_logits = output.logits[:, -1]
        return KVPayload.from_cache(cache, prompt_ids, prompt_mask, self.fingerprint, first_logits=first_logits)

    def _new_cache(self, prompt_ids: torch.Tensor) -> TokenAwareCache:
        return TokenAwareCache(
            self.plan, self.model, prompt_tokens=prompt_ids.shape[1], running_blocks=self.running_blocks
        )

    def _check_length(self, prompt_tokens: int) -> None:
        context = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if context is not None and prompt_tokens >= context:
            raise ValueError(f"the prompt has {prompt_tokens} tokens, the model's context is {context}")
