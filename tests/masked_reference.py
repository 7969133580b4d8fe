"""What a token-aware cache must equal, without any cache: attention in which the dropped tokens are masked."""

import copy
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM

from hf_pdprune.blocks import bypass_blocks, get_blocks
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.kv import TokenAwareCache


def is_sliding(model, block):
    """Whether a block attends through a sliding window, so that the token-aware cache leaves it as it is."""
    layer_types = getattr(model.config, "layer_types", None)
    if layer_types is not None:
        return layer_types[block] != "full_attention"
    return getattr(model.config, "sliding_window", None) is not None


def eager_copy(model):
    """The same model with eager attention, the only one that shows its weights."""
    with torch.random.fork_rng(devices=[]):
        eager = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), attn_implementation="eager", dtype=torch.float32
        )
    eager.load_state_dict(model.state_dict())
    return eager.eval()


def dropped_columns(prompt_mask, kv, window, weights=None):
    """
    Per row and KV head, the prompt columns that a block with this window drops; `weights` are its attention over the
    prompt, of shape (rows, kv_heads, tokens, tokens), or None where the plan does not choose by attention.
    """
    dropped = []
    for row, bits in enumerate(prompt_mask.tolist()):
        real = [column for column, bit in enumerate(bits) if bit]
        if kv.token_choice == "first_last":
            dropped.append([sorted(set(real) - set(real[: window[0]]) - set(real[-window[1] :]))])
            continue
        budget, num_observed = sum(window), min(32, kv.last_tokens)
        observed, earlier = real[-num_observed:], real[:-num_observed]
        dropped.append([])
        for of_head in weights[row].tolist():
            attention = {column: sum(of_head[query][column] for query in observed) for column in earlier}
            pooled = {c: sum(attention.get(c + shift, 0.0) for shift in range(-2, 3)) for c in earlier}
            best = sorted(earlier, key=lambda column: -pooled[column])[: budget - num_observed]
            dropped[-1].append(sorted(set(earlier) - set(best)))
    return dropped


def visible(prompt_mask, rows, tokens, kv, window, weights=None):
    """Which column each query sees in a token-aware block, shape (rows, kv_heads or 1, tokens, tokens)."""
    prompt_tokens = prompt_mask.shape[1]
    copies = rows // len(prompt_mask)  # beams, returned sequences
    dropped = [of_row for of_row in dropped_columns(prompt_mask, kv, window, weights) for _ in range(copies)]
    prompt_mask = prompt_mask.repeat_interleave(copies, dim=0)
    seen = torch.ones(tokens, tokens).tril().bool().repeat(rows, len(dropped[0]), 1, 1)
    seen[..., :prompt_tokens] &= prompt_mask[:, None, None, :tokens].bool()
    for row, of_row in enumerate(dropped):
        for head, columns in enumerate(of_row):
            seen[row, head, prompt_tokens:, columns] = False
    return seen


@torch.no_grad()
def attention_weights(model, prompt_ids, prompt_mask, missing_blocks):
    """By block the attention over the prompts, mean of the heads that share a KV head; by an eager model."""
    eager, weights = eager_copy(model), {}

    def record(block):
        def hook(module, args, output):
            shown = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(shown, torch.Tensor) and shown.dim() == 4:
                weights[block] = shown

        return hook

    for block, module in enumerate(get_blocks(eager)):
        for part in list(module.modules())[1:]:
            part.register_forward_hook(record(block))
    with bypass_blocks(eager, missing_blocks):
        weights.clear()  # to bypass blocks, the model is looked at first
        cache = eager(
            input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=position_ids(prompt_mask), use_cache=True
        ).past_key_values
    return {
        block: of_heads.unflatten(1, (cache.layers[block].keys.shape[1], -1)).mean(dim=2)
        for block, of_heads in weights.items()
    }


@contextmanager
def masked_blocks(model, plan, prompt_ids, prompt_mask):
    """
    Within this context the plan's token-aware blocks attend by a mask of their own, whatever mask they are given: in
    forwards over the whole sequence, queries after the prompt do not see the prompt tokens that the plan drops.
    """
    chosen = None
    if plan.kv.token_choice == "attention":
        chosen = attention_weights(model, prompt_ids, prompt_mask, plan.prefill.missing_blocks)
    num_heads = model.config.num_attention_heads

    def own_mask(block):
        def hook(module, args, kwargs):
            hidden_states = args[0] if args else kwargs["hidden_states"]
            weights = None if chosen is None else chosen[block]
            seen = visible(prompt_mask, *hidden_states.shape[:2], plan.kv, plan.kv.windows[block], weights)
            if seen.shape[1] > 1:
                seen = seen.repeat_interleave(num_heads // seen.shape[1], dim=1)
            mask = torch.zeros(()).masked_fill(~seen, torch.finfo().min)
            if len(args) > 2:  # gpt2 passes (hidden_states, past_key_values, attention_mask, ...)
                return (*args[:2], mask, *args[3:]), kwargs
            return args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [
        get_blocks(model)[block].register_forward_pre_hook(own_mask(block), with_kwargs=True)
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
    with masked_blocks(model, plan, input_ids[:, :prompt_tokens], attention_mask[:, :prompt_tokens]):
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).logits


def masked_generate(model, plan, prompt_mask, **generate_kwargs):
    """What `model.generate` returns with the plan's dropped tokens masked."""
    prompt_ids = generate_kwargs["input_ids"][:, : prompt_mask.shape[1]]
    with masked_blocks(model, plan, prompt_ids, prompt_mask):
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
