"""Number formats, emulated: what a model says where everything it computes is rounded.

    rounded_model(model, "bfloat16")        # a copy of the model that rounds as it goes

Products are taken in float64 and what comes out is rounded to the format, so the answer does not
depend on how a processor adds up: two inputs that are equal give equal outputs, wherever they stand
in a batch. Rounded are

- every weight;
- what each elementary module takes and gives: embeddings, linear layers, norms, activations;
- the residual stream, after attention and after the MLP.

Not rounded are the numbers inside attention (scores, softmax, weighted mean), as in kernels that
keep them in registers, and those inside a norm, which transformers computes in float32.

`int8` and `float8` (e4m3) round what each linear layer reads, a token at a time, scaled to that
token's largest absolute value; everything else is bfloat16. Weights are not quantised.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probe.errors import UserError
from probe.language import LanguageModel

Format = Literal["float64", "float32", "bfloat16", "float16", "float8", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
CASTS: dict[Format, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
INT8_LEVELS = 127
"""Steps on either side of 0."""
Rounding = Callable[[Tensor], Tensor]


def rounded(x: Float[Tensor, "*n d"], format: Format) -> Float[Tensor, "*n d"]:
    """Numbers rounded to a format, ties to even; as float64.

    `int8` and `float8` are scaled by row: the largest absolute value of a row becomes 127 or 448,
    the largest number that the format has.
    """
    if format in CASTS:
        return x.to(CASTS[format]).double()
    x = x.double()
    largest = x.abs().amax(-1, keepdim=True)
    if format == "int8":
        scale = torch.where(largest > 0, largest / INT8_LEVELS, 1.0)
        return (x / scale).round() * scale
    scale = torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    return (x / scale).to(torch.float8_e4m3fn).double() * scale


def rounded_model(model: LanguageModel, format: Format) -> LanguageModel:
    """A copy of a model, in float64, that rounds everything it computes to a format.

    It takes 8 bytes a parameter. Raises `UserError` where its layers are not known.
    """
    if model.names is None:
        raise UserError(
            f"{model.spec} is a {type(model.model).__name__}, whose layers are not known by name, "
            "so its rounding cannot be emulated; choose another model."
        )
    copied = LanguageModel(
        model.spec, copy.deepcopy(model.model).double(), model.tokenizer, model.random_weights
    )
    if format != "float64":
        _round_weights(copied, format)
        _round_activations(copied, format)
    return copied


def _round_weights(model: LanguageModel, format: Format) -> None:
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.copy_(rounded(weight, _carrier(format)))


def _carrier(format: Format) -> Format:
    """The format of what is not read by a linear layer."""
    return format if format in CASTS else "bfloat16"


def _round_activations(model: LanguageModel, format: Format) -> None:
    """Hang the rounding on the modules, for good."""

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _over_floats(output, lambda x: rounded(x, _carrier(format)))

    def before_linear(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(rounded(args[0], _carrier(format)), format), *args[1:])

    def before_norm(_: nn.Module, args: tuple[Any, ...]) -> None:
        # In place: what a norm reads is the residual stream itself, which goes on beside it.
        args[0].copy_(rounded(args[0], _carrier(format)))

    assert model.names is not None, "checked by the caller"
    blocks = set(model.model.get_submodule(model.names.blocks).children())
    for module in model.model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(before_linear)
        elif "norm" in type(module).__name__.lower():
            module.register_forward_pre_hook(before_norm)
        if module in blocks or not any(True for _ in module.children()):
            module.register_forward_hook(after)


def _over_floats(raw: Any, change: Rounding) -> Any:
    """What a module gave, with its tensors of floats changed."""
    if isinstance(raw, tuple):
        return tuple(_over_floats(part, change) for part in raw)
    return change(raw) if isinstance(raw, Tensor) and raw.is_floating_point() else raw
