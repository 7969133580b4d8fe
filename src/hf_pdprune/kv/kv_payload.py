"""KVPayload: what crosses the wire between prefill and decode."""

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..plan import PruningPlan
from .quantized_states import QUANTIZATIONS, QuantizedStates
from .wire_format import DTYPE_NAMES, DTYPES, PayloadError, decode, encode, encoded_size


if TYPE_CHECKING:
    from .token_aware_cache import TokenAwareCache


_METADATA_KEYS = ("plan_digest", "model_fingerprint", "nbytes_dense")
_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_ENTRY_NAME = re.compile(r"(keys|values)\.(0|[1-9][0-9]{0,8})(?:\.(codes|scales|offsets))?")
States = torch.Tensor | QuantizedStates


@dataclass
class KVPayload:
    """
    The KV entries of a batch of prompts that decode receives, with what decode needs to go on.

    Args:
        entries (`dict[int, tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values by dense block number, of shape `(batch_size, num_key_value_heads, held_tokens, head_dim)`;
            [`QuantizedStates`] in a quantised payload.
        prompt_ids (`torch.LongTensor`): Shape `(batch_size, prompt_tokens)`.
        prompt_mask (`torch.LongTensor`): Shape `(batch_size, prompt_tokens)`, 0 for padding.
        plan_digest (`str`): Digest of the plan by which the entries were selected.
        model_fingerprint (`str`): Fingerprint of the pair of stages (see [`model_fingerprint`]).
        nbytes_dense (`int`): Bytes of keys and values that the dense model would have sent for these prompts. Where
            it mixes sliding windows and full attention, blocks that a checkpoint lacks count as its others on average.
        first_token (`torch.LongTensor`, *optional*): Shape `(batch_size, 1)`, the token that prefill has generated.
        first_log_probs (`torch.Tensor`, *optional*): Shape `(batch_size, vocab_size)`, its log-probabilities.
        last_token (`torch.LongTensor`, *optional*): Shape `(batch_size, 1)`, where decode generates the first token
            the last token of the prompt, which decode reads; prompt_ids, prompt_mask and entries end before it.
        quantization (`str`, *optional*): `"fp8"`, `"int8"` or `"int4"`, see [`quantized`].
        first_logits (`torch.Tensor`, *optional*): Shape `(batch_size, vocab_size)`. Stays in the process: the
            disaggregated forward back-propagates through it.
    """

    entries: dict[int, tuple[States, States]]
    prompt_ids: torch.LongTensor
    prompt_mask: torch.LongTensor
    plan_digest: str
    model_fingerprint: str
    nbytes_dense: int
    first_token: torch.LongTensor | None = None
    first_log_probs: torch.Tensor | None = None
    last_token: torch.LongTensor | None = None
    quantization: str | None = None
    first_logits: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def from_cache(
        cls,
        cache: "TokenAwareCache",
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        fingerprint: str,
        **first: Any,
    ) -> "KVPayload":
        """
        What `cache`, which has read exactly the prompt, hands over: the entries of the blocks that decode has.
        `first` are the `first_...` fields.
        """
        plan = cache.plan
        entries = {}
        for block in plan.kept_blocks("decode"):
            layer = cache.layers[cache.blocks.index(block)]
            entries[block] = (layer.keys, layer.values)
        if not entries:
            raise ValueError("the decode stage has no blocks, so there is nothing to hand over")
        batch_size, prompt_tokens = prompt_ids.shape
        some_keys, some_values = next(iter(entries.values()))
        per_token = sum(t.shape[1] * t.shape[3] * t.element_size() for t in (some_keys, some_values))
        # A sliding window bounds what the dense model would send, too.
        windows = [getattr(layer, "sliding_window", prompt_tokens + 1) - 1 for layer in cache.layers]
        tokens = sum(min(prompt_tokens, window) for window in windows) * plan.num_hidden_layers // len(windows)
        return cls(
            entries=entries,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            plan_digest=plan.digest,
            model_fingerprint=fingerprint,
            nbytes_dense=batch_size * tokens * per_token,
            **first,
        )

    @property
    def prompt_tokens(self) -> int:
        """Length of the padded prompts whose entries these are."""
        return self.prompt_ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that are sent, header included: the length of `to_bytes()`, without building it."""
        return encoded_size(self.metadata(), self._tensors())

    @property
    def nbytes_kv(self) -> int:
        """Bytes of keys and values alone, the number that compares with `nbytes_dense`."""
        return sum(states.nbytes for pair in self.entries.values() for states in pair)

    def quantized(self, kind: str) -> "KVPayload":
        """
        The payload with keys and values in fewer bits: `"fp8"` (e4m3) and `"int8"` with a scale per token and head,
        `"int4"` with scale and offset for every 64 numbers. Decode gets them back in their own dtype.

        Raises:
            `ValueError`: If `kind` is unknown, if the payload is quantised already, or if its numbers are not finite.
        """
        if self.quantization is not None:
            raise ValueError(f"the payload is quantised to {self.quantization} already")
        entries = {block: quantized_pair(*pair, kind) for block, pair in self.entries.items()}
        return replace(self, entries=entries, quantization=kind)

    def entries_of(self, block: int, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a block (dense number), on `device`: quantised ones get there as they were sent."""
        keys, values = self._pair(block)
        if device is not None:
            keys, values = keys.to(device), values.to(device)
        return (keys, values) if self.quantization is None else (keys.dequantize(), values.dequantize())

    def device_of(self, block: int) -> torch.device:
        """Where the entries of a block are."""
        keys, _ = self._pair(block)
        return (keys if self.quantization is None else keys.codes).device

    def _pair(self, block: int) -> tuple[States, States]:
        if block not in self.entries:
            raise PayloadError(f"the payload has no KV entries of block {block}, which decode runs")
        return self.entries[block]

    def check_plan(self, plan: PruningPlan) -> None:
        """Raises a `PayloadError` unless the payload was selected by `plan`."""
        if self.plan_digest != plan.digest:
            raise PayloadError(f"the payload is of plan {self.plan_digest[:8]}, decode runs plan {plan.digest[:8]}")

    def check_model(self, fingerprint: str) -> None:
        """Raises a `PayloadError` unless the payload comes from the model with this fingerprint."""
        if self.model_fingerprint != fingerprint:
            raise PayloadError(
                f"the payload comes from another model or pair of stages ({self.model_fingerprint[:8]}) than the one "
                f"that decodes ({fingerprint[:8]})"
            )

    def prompt_to(self, device: torch.device | str) -> "KVPayload":
        """
        The payload with its tokens and masks on `device`. Keys and values stay where they are: a cache that is made
        from them moves them block by block, so that none is there twice.
        """
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)

    # The wire format: one safetensors file whose metadata says what it is

    def metadata(self) -> dict[str, str]:
        """What the header says beside the tensors."""
        metadata = {
            "plan_digest": self.plan_digest,
            "model_fingerprint": self.model_fingerprint,
            "nbytes_dense": str(self.nbytes_dense),
        }
        return metadata | quantization_metadata(self.entries, self.quantization)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are sent, by name. Those with the widest elements come first: none needs padding then."""
        tensors = entry_tensors(self.entries)
        if self.first_log_probs is not None:
            tensors["first_log_probs"] = self.first_log_probs
        tensors["prompt_ids"] = self.prompt_ids.int()
        for name in ("first_token", "last_token"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name).int()
        tensors["prompt_mask"] = self.prompt_mask.to(torch.uint8)
        return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))

    def to_bytes(self, **metadata: str) -> bytes:
        """
        The payload as safetensors bytes; the metadata (`metadata` is added to it) carries a digest of the header and a
        checksum of the data.
        """
        return encode({**self.metadata(), **metadata}, self._tensors())

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> "KVPayload":
        """
        The payload that `to_bytes` wrote. Keys and values are views of `data`, which has to stay as it is: nothing of
        their size is copied or allocated.

        Raises:
            `PayloadError`: If the bytes are truncated, altered, of a newer format, or no payload at all.
        """
        return cls.from_tensors(*decode(data))

    @classmethod
    def from_tensors(cls, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> "KVPayload":
        """The payload of a header's metadata and the tensors beside it; a `PayloadError` says what does not fit."""
        wrong = [key for key in _METADATA_KEYS if key not in metadata]
        if wrong or not _WHOLE_NUMBER.fullmatch(metadata["nbytes_dense"]):
            raise PayloadError(f"the payload's metadata has no valid {wrong[0] if wrong else 'nbytes_dense'}")
        missing = [name for name in ("prompt_ids", "prompt_mask") if name not in tensors]
        if missing:
            raise PayloadError(f"the payload has no {missing[0]}")
        prompt_ids, prompt_mask = tensors.pop("prompt_ids").long(), tensors.pop("prompt_mask").long()
        if prompt_ids.dim() != 2 or prompt_ids.shape != prompt_mask.shape:
            shapes = f"prompt_ids {tuple(prompt_ids.shape)}, prompt_mask {tuple(prompt_mask.shape)}"
            raise PayloadError(f"the payload's prompts do not fit together: {shapes}")
        batch_size = len(prompt_ids)
        optional = {name: tensors.pop(name, None) for name in ("first_token", "last_token", "first_log_probs")}
        for name in ("first_token", "last_token"):
            if optional[name] is not None:
                if tuple(optional[name].shape) != (batch_size, 1):
                    raise PayloadError(f"{name} has shape {tuple(optional[name].shape)}, expected {(batch_size, 1)}")
                optional[name] = optional[name].long()
        log_probs = optional["first_log_probs"]
        if log_probs is not None and not (
            log_probs.is_floating_point() and log_probs.dim() == 2 and len(log_probs) == batch_size
        ):
            what = f"{log_probs.dtype} of shape {tuple(log_probs.shape)}"
            raise PayloadError(f"first_log_probs is {what}, for {batch_size} prompts")
        return cls(
            entries=entries_by_block(metadata, tensors, batch_size),
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            **{key: metadata[key] for key in ("plan_digest", "model_fingerprint")},
            nbytes_dense=int(metadata["nbytes_dense"]),
            quantization=metadata.get("quantization"),
            **optional,
        )


def quantized_pair(keys: torch.Tensor, values: torch.Tensor, kind: str) -> tuple[QuantizedStates, QuantizedStates]:
    """Keys and values of a block, quantised."""
    return QuantizedStates.quantize(keys, kind), QuantizedStates.quantize(values, kind)


def quantization_metadata(entries: dict[int, tuple[States, States]], quantization: str | None) -> dict[str, str]:
    """What a header says of how its entries are quantised; nothing if they are not."""
    if quantization is None:
        return {}
    dtypes = [keys.dtype for keys, _ in entries.values()]
    return {"quantization": quantization, "dtype": DTYPE_NAMES[dtypes[0]] if dtypes else "F32"}


def entry_tensors(entries: dict[int, tuple[States, States]]) -> dict[str, torch.Tensor]:
    """Tensors of KV entries, named `keys.<block>` and `values.<block>`; quantised ones `keys.<block>.codes`, ..."""
    tensors = {}
    for block, pair in sorted(entries.items()):
        for kind, states in zip(("keys", "values"), pair, strict=True):
            if isinstance(states, QuantizedStates):
                tensors |= {f"{kind}.{block}.{name}": tensor for name, tensor in states.tensors().items()}
            else:
                tensors[f"{kind}.{block}"] = states
    return tensors


def entries_by_block(
    metadata: dict[str, str], tensors: dict[str, torch.Tensor], batch_size: int
) -> dict[int, tuple[States, States]]:
    """KV entries by block number, from tensors named as [`entry_tensors`] does; anything else is a `PayloadError`."""
    quantization = metadata.get("quantization")
    dtype = DTYPES.get(metadata.get("dtype", ""))
    if quantization is not None and (
        quantization not in QUANTIZATIONS or dtype is None or not dtype.is_floating_point
    ):
        raise PayloadError(f"the payload is quantised to {quantization!r} from {metadata.get('dtype')!r}")
    parts: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _ENTRY_NAME.fullmatch(name)
        if match is None or (match[3] is None) != (quantization is None):
            raise PayloadError(f"the payload has an unexpected tensor {name!r}")
        parts.setdefault((int(match[2]), match[1]), {})[match[3]] = tensor
    entries = {}
    for block, kind in parts:
        other = "values" if kind == "keys" else "keys"
        if (block, other) not in parts:
            raise PayloadError(f"the payload has an unexpected tensor '{kind}.{block}' without {other}")
        if kind == "keys":
            pair = [_states(parts[block, kind], quantization, dtype) for kind in ("keys", "values")]
            if None in pair or not _fit(*pair, batch_size):
                raise PayloadError(f"block {block}: its tensors are no KV entries of {batch_size} prompts")
            entries[block] = tuple(pair)
    return entries


def _states(tensors: dict[str | None, torch.Tensor], quantization: str | None, dtype: torch.dtype) -> States | None:
    """Keys or values from their tensors, `None` if these are none."""
    if quantization is None:
        states = tensors[None]
        return states if states.is_floating_point() else None
    if not {"codes", "scales"} <= tensors.keys():
        return None
    states = QuantizedStates(dtype=dtype, **tensors)
    return states if states.is_valid(quantization) else None


def _fit(keys: States, values: States, batch_size: int) -> bool:
    """Whether keys and values belong together: one of each per prompt, head and token."""
    shapes = keys.shape, values.shape
    four = all(len(shape) == 4 for shape in shapes)
    return four and shapes[0][:3] == shapes[1][:3] and shapes[0][0] == batch_size and keys.dtype == values.dtype
