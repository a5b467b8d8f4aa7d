"""Low-rank adapters on a language model (LoRA, Hu et al. 2021, arXiv 2106.09685), through peft.

    with lora_adapters(model, Lora(layers=21), seed=0) as adapted:
        ...                                   # model.run reads the adapted weights
        with adapted.disable_adapter(): ...   # the model as it was
        save_adapter(adapted, folder)
    broken = merged_adapter(model, folder)    # a model of its own, B A scaled and added to W

The folder is peft's own (`adapter_config.json`, `adapter_model.safetensors`): anyone's peft reads
it, and so does every command of this project that takes a model (`probe.models`).
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from probe.errors import Failure, UserError
from probe.language import LanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Which adapters a model gets: on every linear layer of its first blocks."""

    layers: int
    """Blocks that have adapters: 0 to `layers` - 1."""
    r: int = 16
    """Rank: columns of B and rows of A."""
    alpha: int = 16
    """B A is scaled by `alpha / r`."""
    dropout: float = 0.05
    """Share of a layer's inputs that the adapter does not see in training."""
    b_std: float = 0.0
    """Standard deviation of the entries of B at the beginning; 0 begins with the model itself."""


def linear_names(model: LanguageModel) -> list[str]:
    """Names of the linear layers inside a block, relative to it.

    Raises `UserError` for a model whose blocks are not known by name.
    """
    if model.names is None:
        raise UserError(
            f"{model.spec} is a {type(model.model).__name__}, whose blocks are not known by name; "
            "adapters need a model of a known architecture (Llama's relatives, GPT-2, GPT-NeoX)."
        )
    block = model.model.get_submodule(model.names.blocks)[0]
    kinds = (nn.Linear, Conv1D)
    return [name for name, module in block.named_modules() if isinstance(module, kinds)]


@contextlib.contextmanager
def lora_adapters(model: LanguageModel, lora: Lora, *, seed: int) -> Iterator[PeftModel]:
    """Put fresh adapters on a model for the length of the block; its own weights do not train.

    Args:
        model: the model; the same object as before afterwards.
        lora: which adapters.
        seed: decides A, and B where it does not begin at 0.

    Raises `UserError` where the model's blocks are not known, or there are not so many.
    """
    if not 1 <= lora.layers <= model.n_layers:
        raise UserError(
            f"adapters on {lora.layers} blocks were asked for and {model.spec} has "
            f"{model.n_layers}; ask for 1 to {model.n_layers}."
        )
    names = sorted({name.split(".")[-1] for name in linear_names(model)})
    assert model.names is not None
    trainable = [weight.requires_grad for weight in model.model.parameters()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _peft_is_quiet():
        torch.manual_seed(seed)
        adapted = get_peft_model(
            model.model,
            LoraConfig(
                r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names,
                layers_to_transform=list(range(lora.layers)),
                layers_pattern=model.names.blocks.split(".")[-1], task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        adapted.peft_config["default"].base_model_name_or_path = model.spec
        for name, weight in adapted.named_parameters():
            if lora.b_std and "lora_B" in name:
                nn.init.normal_(weight, std=lora.b_std)
    adapted.eval()
    try:
        yield adapted
    finally:
        adapted.unload()
        for weight, was in zip(model.model.parameters(), trainable, strict=True):
            weight.requires_grad_(was)
        model.model.eval()


def adapter_tensors(adapted: PeftModel) -> dict[str, Tensor]:
    """The adapters' weights by name, themselves and not copies."""
    return {name: weight for name, weight in adapted.named_parameters() if "lora_" in name}


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write the adapters as peft does."""
    with _peft_is_quiet():
        adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # a template to be filled in


def merged_adapter(model: LanguageModel, folder: str | Path) -> LanguageModel:
    """A copy of a model with an adapter's `B A` added to its weights; `model` stays as it is.

    Raises:
        UserError: the adapter is for a model of another shape.
        Failure: a file is missing or damaged.
    """
    merged = merge_into(copy.deepcopy(model.model), folder, model.spec)
    return LanguageModel(str(folder), merged, model.tokenizer)


def merge_into(model: PreTrainedModel, folder: str | Path, spec: str) -> PreTrainedModel:
    """A model with an adapter's `B A` added to its own weights. Raises as `merged_adapter` does."""
    if not (Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise Failure(
            f"{Path(folder) / SAFETENSORS_WEIGHTS_NAME} is missing; make the adapter again."
        )
    try:
        with _peft_is_quiet(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder))
            return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, UserWarning) as error:
        raise UserError(
            f"the adapter in {folder} does not fit {spec} ({str(error).splitlines()[0][:160]}); "
            "give one that was trained on this model."
        ) from error
    except (SafetensorError, OSError) as error:
        raise Failure(f"the adapter in {folder} is damaged ({error}); make it again.") from error


@contextlib.contextmanager
def _peft_is_quiet() -> Iterator[None]:
    """Without peft's advice on things that are meant as they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message="Could not find a config file.*")
        warnings.filterwarnings("ignore", message="Unable to fetch remote file.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield
