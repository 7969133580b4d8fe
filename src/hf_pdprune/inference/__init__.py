from .decode_stage import DecodeStage
from .disaggregated_forward import dense_forward, disaggregated_forward
from .handover import handover_between_processes, receive_payload, send_payload
from .prefill_stage import PrefillStage
from .stage import Stage


__all__ = [
    "DecodeStage",
    "PrefillStage",
    "Stage",
    "dense_forward",
    "disaggregated_forward",
    "handover_between_processes",
    "receive_payload",
    "send_payload",
]
