from .prompt_completion import PromptCompletionCollator, tokenize_examples
from .text_source import PYDOC_TOPICS, load_text


__all__ = ["PYDOC_TOPICS", "PromptCompletionCollator", "load_text", "tokenize_examples"]
