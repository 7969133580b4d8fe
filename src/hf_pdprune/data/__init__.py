from .text_source import PYDOC_TOPICS, load_text


__all__ = ["PYDOC_TOPICS", "load_text"]
