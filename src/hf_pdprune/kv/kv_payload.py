"""KVPayload: what crosses the wire between prefill and decode."""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..plan import PruningPlan


if TYPE_CHECKING:
    from .token_aware_cache import TokenAwareCache


PAYLOAD_FORMAT_VERSION = 1
_METADATA_KEYS = ("format_version", "plan_digest", "model_fingerprint", "nbytes_dense", "data_crc32", "header_sha256")
_NO_DIGEST = "0" * 64
_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class PayloadError(ValueError):
    """A payload that is truncated, altered, or not meant for the stage that reads it."""


@dataclass
class KVPayload:
    """
    The KV entries of a batch of prompts that decode receives, with what decode needs to go on.

    Args:
        entries (`dict[int, tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values by dense block number, of shape `(batch_size, num_key_value_heads, held_tokens, head_dim)`.
        prompt_ids (`torch.LongTensor`): Shape `(batch_size, prompt_tokens)`.
        prompt_mask (`torch.LongTensor`): Shape `(batch_size, prompt_tokens)`, 0 for padding.
        plan_digest (`str`): Digest of the plan by which the entries were selected.
        model_fingerprint (`str`): Fingerprint of the pair of stages (see [`model_fingerprint`]).
        nbytes_dense (`int`): Bytes of keys and values that the dense model would have sent for these prompts. Where
            it mixes sliding windows and full attention, blocks that a checkpoint lacks count as its others on average.
        first_token (`torch.LongTensor`, *optional*): Shape `(batch_size, 1)`, the token that prefill has generated.
        first_log_probs (`torch.Tensor`, *optional*): Shape `(batch_size, vocab_size)`, its log-probabilities.
        first_logits (`torch.Tensor`, *optional*): Shape `(batch_size, vocab_size)`. Stays in the process: the
            disaggregated forward back-propagates through it.
    """

    entries: dict[int, tuple[torch.Tensor, torch.Tensor]]
    prompt_ids: torch.LongTensor
    prompt_mask: torch.LongTensor
    plan_digest: str
    model_fingerprint: str
    nbytes_dense: int
    first_token: torch.LongTensor | None = None
    first_log_probs: torch.Tensor | None = None
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
        """Length of the padded prompts."""
        return self.prompt_ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that are sent, header included: the length of `to_bytes()`, without building it."""
        tensors = self._tensors()
        data = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return 8 + len(self._header(tensors, crc32=0)) + data

    @property
    def nbytes_kv(self) -> int:
        """Bytes of keys and values alone, the number that compares with `nbytes_dense`."""
        return sum(tensor.numel() * tensor.element_size() for pair in self.entries.values() for tensor in pair)

    def entries_of(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a block (dense number)."""
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

    def to(self, device: torch.device | str) -> "KVPayload":
        """The payload with its tensors on `device`."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return KVPayload(
            {block: (keys.to(device), values.to(device)) for block, (keys, values) in self.entries.items()},
            self.prompt_ids.to(device),
            self.prompt_mask.to(device),
            self.plan_digest,
            self.model_fingerprint,
            self.nbytes_dense,
            moved(self.first_token),
            moved(self.first_log_probs),
            moved(self.first_logits),
        )

    # The wire format: one safetensors file whose metadata says what it is

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are sent, by name. Those with the widest elements come first: none needs padding then."""
        tensors = {}
        for block, (keys, values) in sorted(self.entries.items()):
            tensors[f"keys.{block}"], tensors[f"values.{block}"] = keys, values
        if self.first_log_probs is not None:
            tensors["first_log_probs"] = self.first_log_probs
        tensors["prompt_ids"] = self.prompt_ids.int()
        if self.first_token is not None:
            tensors["first_token"] = self.first_token.int()
        tensors["prompt_mask"] = self.prompt_mask.to(torch.uint8)
        return tensors

    def _header(self, tensors: dict[str, torch.Tensor], crc32: int) -> bytes:
        """The safetensors header of `tensors`, its own digest filled in."""
        metadata = {
            "format_version": str(PAYLOAD_FORMAT_VERSION),
            "plan_digest": self.plan_digest,
            "model_fingerprint": self.model_fingerprint,
            "nbytes_dense": str(self.nbytes_dense),
            "data_crc32": f"{crc32:08x}",
            "header_sha256": _NO_DIGEST,
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.numel() * tensor.element_size()
            dtype = _DTYPE_NAMES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return encoded.replace(_NO_DIGEST.encode(), hashlib.sha256(encoded).hexdigest().encode(), 1)

    def to_bytes(self) -> bytes:
        """The payload as safetensors bytes; the metadata carries a digest of the header and a checksum of the data."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        data = [tensor.view(torch.uint8).numpy().data for tensor in tensors.values()]
        crc32 = 0
        for part in data:
            crc32 = zlib.crc32(part, crc32)
        header = self._header(tensors, crc32)
        return b"".join([len(header).to_bytes(8, "little"), header, *data])

    @classmethod
    def from_bytes(cls, data: bytes) -> "KVPayload":
        """
        The payload that `to_bytes` wrote.

        Raises:
            `PayloadError`: If the bytes are truncated, altered, of a newer format, or no payload at all.
        """
        metadata = _checked_metadata(data)
        try:
            tensors = load(bytes(data))
        except SafetensorError as error:
            raise PayloadError(f"the payload's header does not fit its data: {error}") from error
        missing = [name for name in ("prompt_ids", "prompt_mask") if name not in tensors]
        if missing:
            raise PayloadError(f"the payload has no {missing[0]}")
        prompt_ids, prompt_mask = tensors.pop("prompt_ids").long(), tensors.pop("prompt_mask").long()
        if prompt_ids.dim() != 2 or prompt_ids.shape != prompt_mask.shape:
            shapes = f"prompt_ids {tuple(prompt_ids.shape)}, prompt_mask {tuple(prompt_mask.shape)}"
            raise PayloadError(f"the payload's prompts do not fit together: {shapes}")
        batch_size = prompt_ids.shape[0]
        first_token, first_log_probs = tensors.pop("first_token", None), tensors.pop("first_log_probs", None)
        if first_token is not None and tuple(first_token.shape) != (batch_size, 1):
            raise PayloadError(f"first_token has shape {tuple(first_token.shape)}, expected {(batch_size, 1)}")
        if first_log_probs is not None and not (
            first_log_probs.is_floating_point() and first_log_probs.dim() == 2 and len(first_log_probs) == batch_size
        ):
            what = f"{first_log_probs.dtype} of shape {tuple(first_log_probs.shape)}"
            raise PayloadError(f"first_log_probs is {what}, for {batch_size} prompts")
        return cls(
            entries=_entries_by_block(tensors, batch_size),
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            plan_digest=metadata["plan_digest"],
            model_fingerprint=metadata["model_fingerprint"],
            nbytes_dense=int(metadata["nbytes_dense"]),
            first_token=None if first_token is None else first_token.long(),
            first_log_probs=first_log_probs,
        )


def _checked_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a payload's header, after every check that needs no tensor."""
    if len(data) < 8:
        raise PayloadError(f"the payload is truncated: {len(data)} bytes")
    header_size = int.from_bytes(data[:8], "little")
    if header_size > len(data) - 8:
        raise PayloadError(f"the payload is truncated or altered: {len(data)} bytes, a header of {header_size}")
    raw = bytes(data[8 : 8 + header_size])
    try:
        header = json.loads(raw)
        metadata = header["__metadata__"]
        version, digest = metadata["format_version"], str(metadata["header_sha256"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PayloadError("these bytes are no KV payload: their header has no payload metadata") from error
    if version != str(PAYLOAD_FORMAT_VERSION):
        raise PayloadError(f"the payload has format {version!r}; this hf_pdprune reads {PAYLOAD_FORMAT_VERSION}")
    expected = raw.replace(digest, _NO_DIGEST.encode(), 1)
    if hashlib.sha256(expected).hexdigest().encode() != digest:
        raise PayloadError("the payload's header was altered: its digest differs")
    wrong = [key for key in _METADATA_KEYS if not isinstance(metadata.get(key), str)]
    if wrong or not _WHOLE_NUMBER.fullmatch(metadata["nbytes_dense"]):
        raise PayloadError(f"the payload's metadata has no valid {wrong[0] if wrong else 'nbytes_dense'}")
    body = memoryview(data)[8 + header_size :]
    described = _data_size(header)
    if len(body) != described:
        raise PayloadError(f"the payload is truncated or too long: {len(body)} bytes of data, {described} described")
    if f"{zlib.crc32(body):08x}" != metadata["data_crc32"]:
        raise PayloadError("the payload's data was altered: its checksum differs")
    return metadata


def _data_size(header: Mapping[str, Any]) -> int:
    """Bytes of data that a safetensors header describes."""
    try:
        return max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise PayloadError("the payload's header does not describe its tensors") from error


def _entries_by_block(
    tensors: dict[str, torch.Tensor], batch_size: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values by block number, from tensors named `keys.<block>` and `values.<block>`."""
    entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, keys in tensors.items():
        kind, _, block = name.partition(".")
        if kind not in ("keys", "values") or not _WHOLE_NUMBER.fullmatch(block) or f"values.{block}" not in tensors:
            raise PayloadError(f"the payload has an unexpected tensor {name!r}")
        if kind == "keys":
            values = tensors[f"values.{block}"]
            fit = keys.dim() == values.dim() == 4 and keys.shape[:3] == values.shape[:3] and len(keys) == batch_size
            if not (fit and keys.is_floating_point() and keys.dtype == values.dtype):
                raise PayloadError(
                    f"block {block}: keys {keys.dtype} {tuple(keys.shape)} and values {values.dtype} "
                    f"{tuple(values.shape)} are no KV entries of {batch_size} prompts"
                )
            entries[int(block)] = (keys, values)
    if len(tensors) != 2 * len(entries):
        raise PayloadError("the payload has values without keys")
    return entries
