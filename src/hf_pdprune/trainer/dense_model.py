"""Loads the dense model, and its tokenizer, where a trainer gets its id alone."""

from accelerate.utils import DistributedType
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import SFTConfig
from trl.trainer.utils import create_model_from_path


def load_dense_model(
    model_id: str, args: SFTConfig, quantization_config: QuantizationConfigMixin | None = None
) -> PreTrainedModel:
    """
    Loads a model as `SFTTrainer` does.

    Args:
        model_id (`str`): A folder, or an id on the Hub.
        args ([`~trl.SFTConfig`]): The options, of which `model_init_kwargs` and `trust_remote_code` are read.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): How weights are quantised.

    Raises:
        `ValueError`: If `model_init_kwargs` has a `quantization_config`, too.
    """
    kwargs = {"use_safetensors": True, "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError("quantization_config is given twice: to the trainer and in model_init_kwargs")
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type != DistributedType.NO:
        kwargs["device_map"] = None  # "auto" would spread the model of every process over all devices
    return create_model_from_path(model_id, **kwargs)


def load_tokenizer(model_id: str, args: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that [`load_dense_model`] loads, of the same revision."""
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=args.trust_remote_code)
