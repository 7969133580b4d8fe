"""What a token-aware cache must equal, without any cache: attention in which the dropped tokens are masked."""

from contextlib import contextmanager

import torch

from hf_pdprune.blocks import get_blocks
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.kv import TokenAwareCache


def is_sliding(model, block):
    """Whether a block attends through a sliding window, so that the token-aware cache leaves it as it is."""
    layer_types = getattr(model.config, "layer_types", None)
    if layer_types is not None:
        return layer_types[block] != "full_attention"
    return getattr(model.config, "sliding_window", None) is not None


def dropped_columns(prompt_mask, first_tokens, last_tokens):
    """Per row, the prompt columns that a token-aware block drops."""
    dropped = []
    for row in prompt_mask.tolist():
        real = [column for column, value in enumerate(row) if value]
        dropped.append(sorted(set(real) - set(real[:first_tokens]) - set(real[-last_tokens:])))
    return dropped


def visible(prompt_mask, rows, tokens, kv):
    """Which column each query sees in a token-aware block, shape (rows, 1, tokens, tokens)."""
    prompt_tokens = prompt_mask.shape[1]
    prompt_mask = prompt_mask.repeat_interleave(rows // len(prompt_mask), dim=0)  # beams, returned sequences
    seen = torch.ones(tokens, tokens).tril().bool().repeat(rows, 1, 1)
    seen[:, :, :prompt_tokens] &= prompt_mask[:, None, :tokens].bool()
    for row, columns in enumerate(dropped_columns(prompt_mask, kv.first_tokens, kv.last_tokens)):
        seen[row, prompt_tokens:, columns] = False
    return seen[:, None]


@contextmanager
def masked_blocks(model, plan, prompt_mask):
    """
    Within this context the plan's token-aware blocks attend by a mask of their own, whatever mask they are given: in
    forwards over the whole sequence, queries after the prompt do not see the prompt tokens that the plan drops.
    """

    def own_mask(module, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        seen = visible(prompt_mask, *hidden_states.shape[:2], plan.kv)
        mask = torch.zeros(()).masked_fill(~seen, torch.finfo().min)
        if len(args) > 2:  # gpt2 passes (hidden_states, past_key_values, attention_mask, ...)
            return (*args[:2], mask, *args[3:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        get_blocks(model)[block].register_forward_pre_hook(own_mask, with_kwargs=True)
        for block in plan.kv.token_aware_blocks
        if not is_sliding(model, block)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def masked_logits(model, plan, input_ids, attention_mask, prompt_tokens):
    """Logits of all tokens, shape (batch_size, tokens, vocab_size), with the plan's dropped tokens masked."""
    with masked_blocks(model, plan, attention_mask[:, :prompt_tokens]):
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).logits


def masked_generate(model, plan, prompt_mask, **generate_kwargs):
    """What `model.generate` returns with the plan's dropped tokens masked."""
    with masked_blocks(model, plan, prompt_mask):
        return model.generate(use_cache=False, **generate_kwargs)


@torch.no_grad()
def cached_logits(model, cache, input_ids, attention_mask, sizes):
    """Logits of the tokens that `cache` has not seen, from forwards of these sizes."""
    logits = []
    begin = cache.get_seq_length()
    for size in sizes:
        end = begin + size
        output = model(
            input_ids=input_ids[:, begin:end],
            attention_mask=attention_mask[:, :end],
            position_ids=position_ids(attention_mask[:, :end])[:, begin:],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
        begin = end
    return torch.cat(logits, dim=1)


def random_prompts(lengths, vocab_size=256, seed=0):
    """Random prompts of these lengths, padded left: ids and mask. Ids 0 to 2 (padding, begin, end) do not occur."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths], dtype=torch.long)
    ids = torch.randint(3, vocab_size, (len(lengths), width), generator=generator)
    return ids * mask, mask


def with_completion(input_ids, mask, completion_tokens, seed=1):
    """Prompts and a random completion of each: ids and mask."""
    completion, ones = (t[:, :completion_tokens] for t in random_prompts([32] * len(input_ids), seed=seed))
    return torch.cat([input_ids, completion], dim=1), torch.cat([mask, ones], dim=1)


def filled_cache(plan, model, input_ids, mask, completion_tokens):
    """A cache that has read the prompts and a random completion of each token by token; with the ids and mask."""
    cache = TokenAwareCache(plan, model)
    prompt_tokens = input_ids.shape[1]
    input_ids, mask = with_completion(input_ids, mask, completion_tokens)
    cached_logits(model, cache, input_ids, mask, [prompt_tokens] + [1] * completion_tokens)
    return cache, input_ids, mask
