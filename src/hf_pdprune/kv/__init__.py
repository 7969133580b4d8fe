from .kv_payload import KVPayload
from .payload_stream import PayloadReader, PayloadWriter
from .prompt_window import PromptWindow
from .quantized_states import QUANTIZATIONS, QuantizedStates
from .static_decode_cache import StaticDecodeCache
from .token_aware_cache import TokenAwareCache
from .wire_format import PayloadError


__all__ = [
    "QUANTIZATIONS",
    "KVPayload",
    "PayloadError",
    "PayloadReader",
    "PayloadWriter",
    "PromptWindow",
    "QuantizedStates",
    "StaticDecodeCache",
    "TokenAwareCache",
]
