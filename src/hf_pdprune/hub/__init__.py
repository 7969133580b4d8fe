from .adapter_checkpoint import load_adapters, save_adapters
from .load_stages import load_stages
from .model_card import model_card, write_model_cards
from .push import push_stages_to_hub
from .stage_checkpoint import build_stage, export_stage, export_stages


__all__ = [
    "build_stage",
    "export_stage",
    "export_stages",
    "load_adapters",
    "load_stages",
    "model_card",
    "push_stages_to_hub",
    "save_adapters",
    "write_model_cards",
]
