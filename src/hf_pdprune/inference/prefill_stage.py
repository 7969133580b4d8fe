"""PrefillStage: prompts -> KVPayload."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..blocks import get_blocks
from ..kv import QUANTIZATIONS, KVPayload, PayloadWriter, TokenAwareCache
from ..pair_layout import check_first_token
from ..plan import PruningPlan
from ..shortened_config import context_length
from .stage import Stage, position_ids


class PrefillStage(Stage):
    """
    Reads prompts, generates the first token, and hands over the KV entries that the plan selects.

    Args:
        model, plan, adapter, module, fingerprint: As for [`Stage`].
        quantization (`str`, *optional*): `"fp8"`, `"int8"` or `"int4"`: payloads are quantised so, see
            [`KVPayload.quantized`]. It multiplies with what the plan leaves out.

    Example:

    ```python
    prefill = PrefillStage(AutoModelForCausalLM.from_pretrained("outputs/demo/prefill"), plan)
    payload = prefill(**tokenizer(["The capital of France is"], return_tensors="pt"))
    wire = payload.to_bytes()
    ```
    """

    name = "prefill"

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        adapter: str | None = None,
        module: nn.Module | None = None,
        fingerprint: str | None = None,
        quantization: str | None = None,
    ):
        super().__init__(model, plan, adapter, module, fingerprint)
        _check_quantization(quantization)
        self.quantization = quantization

    def quantized(self, kind: str | None) -> "PrefillStage":
        """The same stage with payloads of `kind` (see `quantization`); the weights are shared."""
        _check_quantization(kind)
        same = copy.copy(self)
        same.quantization = kind
        return same

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        return_log_probs: bool = False,
        first_token: str = "prefill",
        send: Callable[[bytes], Any] | None = None,
        **generate_kwargs: Any,
    ) -> KVPayload:
        """
        Args:
            input_ids (`torch.LongTensor`): Shape `(batch_size, prompt_tokens)`, padded left.
            attention_mask (`torch.Tensor`, *optional*): Shape `(batch_size, prompt_tokens)`, 0 for padding.
            return_log_probs (`bool`, defaults to `False`): Whether the payload carries the first token's
                log-probabilities.
            first_token (`str`, defaults to `"prefill"`): Who generates the first token. With `"decode"` the prompt's
                last token is read by decode: beams and returned sequences then part at the first token.
            send (`Callable[[bytes], Any]`, *optional*): Called with the frames of the payload, each as soon as a
                block's prefill is done (see [`PayloadWriter`]). What it does in this thread, prefill waits for; see
                [`ThrottledSender`] for a thread that does it beside.
            generate_kwargs: As for `model.generate` (`do_sample`, `temperature`, ...). How many tokens, beams and
                sequences there will be is up to decode.

        Raises:
            `ValueError`: If a prompt is longer than the model's context, is padded on the right, or has one token and
            decode is to read it, or if `generate_kwargs` ask for what a hand-over cannot do.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_first_token(first_token)
        self._check_length(input_ids.shape[1])
        self.check_generation_settings(generate_kwargs, generates_first=first_token == "prefill")
        if not attention_mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: one ends with padding")
        first = {}
        if first_token == "decode":
            if return_log_probs or input_ids.shape[1] < 2:
                what = "a prompt of one token" if input_ids.shape[1] < 2 else "return_log_probs"
                raise ValueError(f"{what} leaves prefill nothing to do where decode generates the first token")
            first["last_token"] = input_ids[:, -1:]
            input_ids, attention_mask = input_ids[:, :-1], attention_mask[:, :-1]
        with self.active(), self._new_cache(input_ids) as cache, self._streaming(cache, send) as writer:
            if first_token == "decode":
                self._read(input_ids, attention_mask, cache)
            else:
                first |= self._generate_first(input_ids, attention_mask, cache, return_log_probs, generate_kwargs)
        payload = KVPayload.from_cache(cache, input_ids, attention_mask, self.fingerprint, **first)
        if writer is not None:
            return writer.finish(payload)
        return payload if self.quantization is None else payload.quantized(self.quantization)

    def _generate_first(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        cache: TokenAwareCache,
        return_log_probs: bool,
        generate_kwargs: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """The payload's `first_...` fields."""
        least = self.generation_setting(generate_kwargs, "min_new_tokens")
        if least is None:
            least = (self.generation_setting(generate_kwargs, "min_length") or 0) - input_ids.shape[1]
        if self.generation_setting(generate_kwargs, "max_new_tokens") != 1:
            generate_kwargs["forced_eos_token_id"] = None  # it is decode's last token that is forced
        generate_kwargs |= {"max_new_tokens": 1, "min_new_tokens": 1 if least > 0 else None}
        generate_kwargs |= {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True}
        for name in ("max_length", "min_length", "streamer", "assistant_model", "prompt_lookup_num_tokens"):
            generate_kwargs[name] = None
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
        return first

    @contextmanager
    def _streaming(
        self, cache: TokenAwareCache, send: Callable[[bytes], Any] | None
    ) -> Iterator[PayloadWriter | None]:
        """Within this context `send` gets the entries of a block as soon as it has read all of the prompt."""
        if send is None:
            yield None
            return
        writer = PayloadWriter(send, self.plan.digest, self.fingerprint, self.quantization)
        numbers = self.plan.kept_blocks("decode")
        with ExitStack() as hooks:
            for index, number in enumerate(cache.blocks):
                if number in numbers:

                    def send_block(*_: Any, number: int = number, index: int = index) -> None:
                        # Not before, where it is read in chunks, nor in somebody else's forward.
                        if cache.is_in_forward and cache.prompt_is_complete:
                            writer.send_block(number, cache.layers[index].keys, cache.layers[index].values)

                    handle = get_blocks(self.model)[index].register_forward_hook(send_block)
                    hooks.callback(handle.remove)
            yield writer

    def _read(self, prompt_ids: torch.LongTensor, prompt_mask: torch.Tensor, cache: TokenAwareCache) -> torch.Tensor:
        """The logits of the token after the prompt, shape `(batch_size, vocab_size)`."""
        output = self.module(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            position_ids=position_ids(prompt_mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def forward(self, prompt_ids: torch.LongTensor, prompt_mask: torch.Tensor) -> KVPayload:
        """
        The prefill half of the disaggregated forward: differentiable (unless quantised), with the logits of the
        first completion token in `payload.first_logits`.

        Args:
            prompt_ids (`torch.LongTensor`): Shape `(batch_size, prompt_tokens)`, padded left.
            prompt_mask (`torch.Tensor`): Shape `(batch_size, prompt_tokens)`, 0 for padding.
        """
        with self.active(), self._new_cache(prompt_ids) as cache:
            first_logits = self._read(prompt_ids, prompt_mask, cache)
        payload = KVPayload.from_cache(cache, prompt_ids, prompt_mask, self.fingerprint, first_logits=first_logits)
        if self.quantization is None:
            return payload
        if any(states.requires_grad for pair in payload.entries.values() for states in pair):
            raise ValueError("a quantised hand-over has no gradient: train without quantization, or under no_grad")
        return payload.quantized(self.quantization)

    def _new_cache(self, prompt_ids: torch.Tensor) -> TokenAwareCache:
        return TokenAwareCache(
            self.plan, self.model, prompt_tokens=prompt_ids.shape[1], running_blocks=self.running_blocks
        )

    def _check_length(self, prompt_tokens: int) -> None:
        context = context_length(self.model.config)
        if context is not None and prompt_tokens >= context:
            raise ValueError(f"the prompt has {prompt_tokens} tokens, the model's context is {context}")


def _check_quantization(kind: str | None) -> None:
    if kind is not None and kind not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {kind!r}")
