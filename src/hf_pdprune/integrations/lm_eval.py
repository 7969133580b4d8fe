"""PDPruneLM: a pair of stages as a model of EleutherAI's lm-evaluation-harness, `--model hf-pdprune`."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..evaluation.continuation_scorer import ContinuationScorer
from ..evaluation.pair_source import PairSource
from ..inference import DecodeStage, PrefillStage
from ..pair_layout import check_first_token
from ..plan import PruningPlan


logger = logging.getLogger(__name__)


@register_model("hf-pdprune")
class PDPruneLM(HFLM):
    """
    A pair of stages in lm-eval, scored as it is deployed: a request's context goes through the prefill stage, its
    continuation through the decode stage on the KV entries that the plan hands over.

        python -m hf_pdprune.integrations.lm_eval run --model hf-pdprune \\
            --model_args prefill=outputs/demo/prefill,decode=outputs/demo/decode --tasks piqa --batch_size 8

    All that concerns text (tokens, truncation, windows, stop sequences) is lm-eval's own `hf` model, from which this
    class comes; with a plan that removes nothing it gives that model's numbers. Answers that share a context share its
    prefill. Several processes (`accelerate launch -m hf_pdprune.integrations.lm_eval ...`) take a share of the
    requests each.

    In tasks of rolling log-likelihood (WikiText) a text has no prompt: the first `rolling_prompt_share` of each window
    is read, and predicted, by prefill, and the rest by decode.

    Args:
        pretrained (`str`, *optional*): A pair, folder or repo id, or with `plan` the dense model; see [`PairSource`].
        prefill (`str` or [`PrefillStage`], *optional*): The prefill stage.
        decode (`str` or [`DecodeStage`], *optional*): The decode stage.
        plan (`str`, *optional*): Plan of the dense model; `"empty"` removes nothing.
        adapters (`str`, *optional*): Adapters of the dense model.
        tokenizer (`str` or tokenizer, *optional*): Default: the one beside the prefill stage or dense model.
        rolling_prompt_share (`float`, defaults to 0.5): See above.
        first_token (`str`, defaults to `"prefill"`): Which stage predicts the first token of a continuation;
            `"decode"` reads the context's last token itself.
        batch_size (`int` or `str`, defaults to 1): Contexts, and continuations, per forward; `"auto"` finds it.
        max_batch_size (`int`, *optional*): The most that `"auto"` tries, 64 by default.
        max_length (`int`, *optional*): Tokens of context and continuation. Default: the model's context.
        dtype (`str`, defaults to `"auto"`): Of the weights.
        device (`str`, *optional*): Default: an accelerator where there is one.
        attn_implementation (`str`, *optional*): `sdpa`, `eager`, `flash_attention_2`, ...
        add_bos_token (`bool`, *optional*): As for lm-eval's `hf`.
        prefix_token_id (`int`, *optional*): As for lm-eval's `hf`.

    Raises:
        `ValueError`: If the stages do not belong together.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        prefill: str | PrefillStage | None = None,
        decode: str | DecodeStage | None = None,
        plan: str | PruningPlan | None = None,
        adapters: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        rolling_prompt_share: float = 0.5,
        first_token: str = "prefill",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ):
        check_first_token(first_token)
        accelerator = Accelerator()
        if isinstance(prefill, PrefillStage) and isinstance(decode, DecodeStage):
            pair = (prefill, decode)
            if tokenizer is None:
                raise ValueError("stages that are loaded already come with tokenizer=")
        else:
            source = PairSource(pretrained, prefill, decode, plan, adapters)
            model_kwargs = {"dtype": dtype}
            if attn_implementation is not None:
                model_kwargs["attn_implementation"] = attn_implementation
            pair = source.load(**model_kwargs)
            # lm-eval's command line says cuda where it was not told anything, also where there is none.
            is_missing = device is not None and device.startswith("cuda") and not torch.cuda.is_available()
            is_default = device in (None, "cuda") or is_missing or accelerator.num_processes > 1
            place = accelerator.device if is_default else torch.device(device)
            for stage in pair:
                stage.model.to(place)
            if tokenizer is None:
                where = source.tokenizer
                tokenizer = AutoTokenizer.from_pretrained(where.path, subfolder=where.subfolder)
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.prefill, self.decode = pair
        self.rolling_prompt_share = rolling_prompt_share
        self.first_token = first_token
        super().__init__(
            pretrained=self.prefill.model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=64 if max_batch_size is None else max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    @property
    def model(self) -> torch.nn.Module:
        """The prefill stage's model, whose config and tokenizer are the pair's."""
        return self._model

    def _scorer(self, batch_size: int) -> ContinuationScorer:
        padding = self.tokenizer.pad_token_id or 0
        return ContinuationScorer(self.prefill, self.decode, batch_size, padding, self.first_token)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            # As lm-eval's own model cuts them: from the left, the last token being predicted only.
            begin = max(len(context) + len(continuation) - self.max_length - 1, 0)
            pairs.append((context[begin:], continuation))
        batch_size = self.batch_size
        if batch_size == "auto":
            batch_size = override_bs or self._detect_batch_size(requests, 0)
        scorer = self._scorer(int(batch_size))
        # Windows of a rolling log-likelihood come without the strings that they were made from.
        is_rolling = bool(requests) and requests[0][0] is None
        scores = scorer.score_windows(pairs, self.rolling_prompt_share) if is_rolling else scorer.score(pairs)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        quiet = disable_tqdm or self.rank != 0 or is_rolling
        for index, total, is_greedy in tqdm(
            scores, total=len(requests), desc="Running loglikelihood requests", disable=quiet
        ):
            results[index] = (total, is_greedy)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return results

    def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """What the search for a batch size runs: both stages on half of the tokens each."""
        half = max(inps.shape[1] // 2, 1)
        rows = [(row[:half], row[half:] + row[:1]) for row in inps.tolist()]
        list(self._scorer(len(rows)).score(rows))
        return torch.zeros((*inps.shape, 1))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        attention_mask = generation_kwargs.pop("attention_mask", None)
        temperature = generation_kwargs.pop("temperature", 0.0)
        if temperature == 0.0:
            generation_kwargs.setdefault("do_sample", False)
        else:
            generation_kwargs["temperature"] = temperature
        generation_kwargs["pad_token_id"] = self.tokenizer.pad_token_id
        first_token = self.first_token if context.shape[1] > 1 else "prefill"
        payload = self.prefill(context, attention_mask, first_token=first_token, **generation_kwargs)
        return self.decode.generate(
            payload,
            max_new_tokens=max_length - context.shape[1],
            stopping_criteria=StoppingCriteriaList([StopSequences(self.tokenizer, stop, context.shape[1])]),
            **generation_kwargs,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval records of the model beside its results."""
        return {
            "model_num_parameters": self.prefill.model.num_parameters(),
            "decode_num_parameters": self.decode.model.num_parameters(),
            "model_dtype": self.prefill.model.dtype,
            "base_model": self.prefill.plan.base_model,
            "plan_digest": self.prefill.plan.digest,
            "rolling_prompt_share": self.rolling_prompt_share,
            "first_token": self.first_token,
        }


class StopSequences(StoppingCriteria):
    """
    Rows stop at the first of some texts. It keeps no state, so that rows may leave the batch meanwhile.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        sequences (`Sequence[str]`): The texts.
        prompt_tokens (`int`): Length of the padded prompts, in which nothing is looked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[str], prompt_tokens: int):
        self.tokenizer = tokenizer
        self.sequences = [sequence for sequence in sequences if sequence]
        self.prompt_tokens = prompt_tokens
        # Generated text may be cut into tokens otherwise than the sequence by itself.
        lengths = [len(tokenizer.encode(sequence, add_special_tokens=False)) for sequence in self.sequences]
        self.look_back = max(lengths, default=0) + 2

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        ends = self.tokenizer.batch_decode(input_ids[:, self.prompt_tokens :][:, -self.look_back :])
        stopped = [any(sequence in end for sequence in self.sequences) for end in ends]
        return torch.tensor(stopped, device=input_ids.device)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
