from .kv_payload import KVPayload, PayloadError
from .prompt_window import PromptWindow
from .token_aware_cache import TokenAwareCache


__all__ = ["KVPayload", "PayloadError", "PromptWindow", "TokenAwareCache"]
