from .packed_tokens import pack_tokens, tokenize_rows
from .prompt_completion import PromptCompletionCollator, tokenize_examples
from .python_text import PYDOC_DOCSTRINGS, PYDOC_TOPICS
from .source_digest import source_digest
from .text_source import load_text, public_name, single_sources


__all__ = [
    "PYDOC_DOCSTRINGS",
    "PYDOC_TOPICS",
    "PromptCompletionCollator",
    "load_text",
    "pack_tokens",
    "public_name",
    "single_sources",
    "source_digest",
    "tokenize_examples",
    "tokenize_rows",
]
