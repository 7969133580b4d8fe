"""PayloadWriter, PayloadReader: a KVPayload in frames, one per block, sent while prefill still computes the others."""

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .kv_payload import KVPayload, entries_by_block, entry_tensors, quantization_metadata, quantized_pair
from .wire_format import PayloadError, decode, encode


class PayloadWriter:
    """
    Sends a payload block by block. A frame is a safetensors file like a whole payload: those of the blocks carry their
    entries, the last one everything else and the blocks' numbers.

    Args:
        send (`Callable[[bytes], Any]`): Called with each frame.
        plan_digest (`str`): As for [`KVPayload`].
        model_fingerprint (`str`): As for [`KVPayload`].
        quantization (`str`, *optional*): As for [`KVPayload`].
    """

    def __init__(
        self,
        send: Callable[[bytes], Any],
        plan_digest: str,
        model_fingerprint: str,
        quantization: str | None = None,
    ):
        self.send = send
        self.quantization = quantization
        self.entries: dict[int, tuple] = {}
        # Tells the frames of one stream from those of another.
        self._common = {
            "stream": secrets.token_hex(8),
            "plan_digest": plan_digest,
            "model_fingerprint": model_fingerprint,
        }

    def send_block(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Sends the entries of a block (dense number), quantised where the stream is."""
        pair = (keys, values) if self.quantization is None else quantized_pair(keys, values, self.quantization)
        self.entries[block] = pair
        tensors = entry_tensors({block: pair})
        metadata = self._common | quantization_metadata({block: pair}, self.quantization)
        self.send(encode(metadata, dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))))

    def finish(self, payload: KVPayload) -> KVPayload:
        """Sends the rest of `payload`, and returns it with the entries that were sent."""
        payload = replace(payload, entries=self.entries, quantization=self.quantization)
        blocks = ",".join(map(str, sorted(self.entries)))
        rest = replace(payload, entries={}, quantization=None)
        self.send(rest.to_bytes(stream=self._common["stream"], blocks=blocks))
        return payload


class PayloadReader:
    """
    Puts the frames of one [`PayloadWriter`] together, in whatever order the blocks come.

    Args:
        plan_digest (`str`, *optional*): Of the plan that decode runs: a stream of another one is refused at its first
            frame.
    """

    def __init__(self, plan_digest: str | None = None):
        self.plan_digest = plan_digest
        self._common: dict[str, str] | None = None
        self._quantization: dict[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}

    def feed(self, frame: bytes | bytearray | memoryview) -> KVPayload | None:
        """
        Takes the next frame; the payload is returned with the last one. Keys and values are views of the frames.

        Raises:
            `PayloadError`: If the frame is truncated, altered, of another stream, there already, or if it is the last
                one and blocks are missing.
        """
        metadata, tensors = decode(frame)
        common = {key: metadata.get(key) for key in ("stream", "plan_digest", "model_fingerprint")}
        if None in common.values():
            raise PayloadError("the frame belongs to no stream: it is a payload by itself, or none")
        if self.plan_digest is not None and common["plan_digest"] != self.plan_digest:
            raise PayloadError(
                f"the stream is of plan {common['plan_digest'][:8]}, decode runs plan {self.plan_digest[:8]}"
            )
        if self._common is None:
            self._common = common
        elif common != self._common:
            raise PayloadError("the frame belongs to another stream than the ones before it")
        if "blocks" not in metadata:
            twice = self._tensors.keys() & tensors.keys()
            if twice:
                raise PayloadError(f"the stream has {min(twice)} twice")
            self._quantization = {key: metadata[key] for key in ("quantization", "dtype") if key in metadata}
            self._tensors |= tensors
            return None
        payload = KVPayload.from_tensors(metadata, tensors)
        entries = entries_by_block(self._quantization, self._tensors, len(payload.prompt_ids))
        if ",".join(map(str, sorted(entries))) != metadata["blocks"]:
            there = ", ".join(map(str, sorted(entries))) or "none"
            raise PayloadError(f"the stream ends with blocks {there}; it announces {metadata['blocks'] or 'none'}")
        return replace(payload, entries=entries, quantization=self._quantization.get("quantization"))
