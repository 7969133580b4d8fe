from .model_card import model_card, write_model_cards
from .stage_checkpoint import build_stage, export_stage, export_stages, load_stages


__all__ = ["build_stage", "export_stage", "export_stages", "load_stages", "model_card", "write_model_cards"]
