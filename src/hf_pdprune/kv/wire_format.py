"""Wire format: safetensors bytes whose metadata carries digests, written at once and read without a copy."""

import hashlib
import json
import math
import warnings
import zlib
from typing import Any

import torch


FORMAT_VERSION = 2
# A header describes some tensors per block: what is longer is no payload. It bounds what parsing it can cost.
_MOST_HEADER_BYTES = 1 << 20
_MOST_DIMENSIONS = 4
_NO_DIGEST = "0" * 64
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class PayloadError(ValueError):
    """A payload that is truncated, altered, or not meant for the stage that reads it."""


def encode(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> bytes:
    """
    One safetensors file.

    Args:
        metadata (`dict[str, str]`): What the header says beside the tensors.
        tensors (`dict[str, torch.Tensor]`): In the order in which they are written, those with the widest elements
            first: none needs padding then.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = [tensor.view(torch.uint8).numpy().data for tensor in tensors.values()]
    crc32 = 0
    for part in data:
        crc32 = zlib.crc32(part, crc32)
    header = _header(metadata, tensors, crc32)
    return b"".join([len(header).to_bytes(8, "little"), header, *data])


def encoded_size(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> int:
    """Length of what [`encode`] gives, without making it."""
    return 8 + len(_header(metadata, tensors, crc32=0)) + sum(map(_nbytes, tensors.values()))


def _header(metadata: dict[str, str], tensors: dict[str, torch.Tensor], crc32: int) -> bytes:
    """The safetensors header, its own digest filled in."""
    entries = {
        "format_version": str(FORMAT_VERSION),
        **metadata,
        "data_crc32": f"{crc32:08x}",
        "header_sha256": _NO_DIGEST,
    }
    header: dict[str, Any] = {"__metadata__": entries}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _nbytes(tensor)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return encoded.replace(_NO_DIGEST.encode(), hashlib.sha256(encoded).hexdigest().encode(), 1)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def decode(data: bytes | bytearray | memoryview) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """
    Metadata and tensors of what [`encode`] wrote. The tensors are views of `data`: nothing is copied, and nothing but
    the header's few thousand bytes is allocated.

    Raises:
        `PayloadError`: If the bytes are truncated, altered, of a newer format, or no payload at all.
    """
    data = memoryview(data).cast("B")
    if len(data) < 8:
        raise PayloadError(f"the payload is truncated: {len(data)} bytes")
    header_size = int.from_bytes(data[:8], "little")
    if header_size > min(len(data) - 8, _MOST_HEADER_BYTES):
        raise PayloadError(f"the payload is truncated or altered: {len(data)} bytes, a header of {header_size}")
    header, metadata = _checked_header(bytes(data[8 : 8 + header_size]))
    body = data[8 + header_size :]
    entries = _by_place(header)
    described = max((entry["data_offsets"][1] for _, entry in entries), default=0)
    if len(body) != described:
        raise PayloadError(f"the payload is truncated or too long: {len(body)} bytes of data, {described} described")
    if f"{zlib.crc32(body):08x}" != metadata["data_crc32"]:
        raise PayloadError("the payload's data was altered: its checksum differs")
    return metadata, _views(entries, body)


def _checked_header(raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header and its metadata, if its digest is right."""
    try:
        header = json.loads(raw)
        metadata = header["__metadata__"]
        version, digest = metadata["format_version"], str(metadata["header_sha256"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PayloadError("these bytes are no KV payload: their header has no payload metadata") from error
    if version != str(FORMAT_VERSION):
        raise PayloadError(f"the payload has format {version!r}; this hf_pdprune reads {FORMAT_VERSION}")
    expected = raw.replace(digest, _NO_DIGEST.encode(), 1)
    if hashlib.sha256(expected).hexdigest().encode() != digest:
        raise PayloadError("the payload's header was altered: its digest differs")
    wrong = [key for key, value in {"data_crc32": None, **metadata}.items() if not isinstance(value, str)]
    if wrong:
        raise PayloadError(f"the payload's metadata has no valid {wrong[0]}")
    return header, metadata


def _by_place(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and entries of the tensors in the order of their data."""
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for _, entry in entries:
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
            raise PayloadError("the payload's header does not describe its tensors")
    return sorted(entries, key=lambda item: item[1]["data_offsets"])


def _views(entries: list[tuple[str, dict[str, Any]]], body: memoryview) -> dict[str, torch.Tensor]:
    """The tensors of a header, which have to follow each other without gaps."""
    tensors: dict[str, torch.Tensor] = {}
    end = 0
    for name, entry in entries:
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise PayloadError(f"the payload's header does not fit its data: {name} has dtype {entry.get('dtype')!r}")
        if not isinstance(shape, list) or not 1 <= len(shape) <= _MOST_DIMENSIONS or not all(map(_is_length, shape)):
            raise PayloadError(f"the payload's header does not fit its data: {name} has shape {shape!r}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        if entry["data_offsets"] != [begin, end] or end > len(body) or begin % dtype.itemsize:
            raise PayloadError(
                f"the payload's header does not fit its data: {name} is at {entry['data_offsets']}, not {[begin, end]}"
            )
        with warnings.catch_warnings():
            # torch warns of memory that must not be written to: no one does, and a copy would cost time and memory.
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.frombuffer(body[begin:end], dtype=dtype)
        aligned = tensor.data_ptr() % dtype.itemsize == 0  # memory of a stranger's may begin anywhere
        tensors[name] = (tensor if aligned else tensor.clone()).view(shape)
    if end != len(body):
        raise PayloadError(f"the payload's header does not fit its data: {len(body) - end} bytes belong to no tensor")
    return tensors


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
