from .decode_stage import DecodeStage
from .disaggregated_forward import dense_forward, disaggregated_forward
from .handover import handover_between_processes, receive_payload, send_payload
from .handover_group import choose_backend, init_handover_group, nccl_gpus
from .link import LINKS, Link, ThrottledSender, receive_frame
from .prefill_stage import PrefillStage
from .stage import Stage


__all__ = [
    "LINKS",
    "DecodeStage",
    "Link",
    "PrefillStage",
    "Stage",
    "ThrottledSender",
    "choose_backend",
    "dense_forward",
    "disaggregated_forward",
    "handover_between_processes",
    "init_handover_group",
    "nccl_gpus",
    "receive_frame",
    "receive_payload",
    "send_payload",
]
