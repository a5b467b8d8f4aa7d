"""What the rest of the project asks of a model, whatever it reads and makes.

An adapter (`probe.language.LanguageModel`, `probe.diffusion.DiffusionModel`) knows where each
site's tensor passes by and how it is laid out. Outside it, an activation is always `[b, t, d]`: of
text `t` are the tokens of a row, of an image the places of a feature map, row by row.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.errors import UserError
from probe.sites import Site

HookSide = Literal["input", "output", "update"]
"""What of a module a site means: `update` is its output minus its input."""


class ForwardStopped(Exception):
    """Raised by a capturing hook when every site has been seen; the adapter's `run` takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where in a run a pass is."""

    offset: int = 0
    """Of text, the position of the pass's first token."""
    step: int = 0
    """Of images, the denoising step, counted from 0."""
    n_unconditional: int = 0
    """Of images drawn with guidance, how many rows read nothing; they come first."""


@runtime_checkable
class Model(Protocol):
    """A model with named sites."""

    spec: str
    """The name it was asked for by."""
    random_weights: int | None
    """The seed, where the weights are fresh random ones."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format."""
        ...

    @property
    def net(self) -> nn.Module:
        """What runs once a pass."""
        ...

    @property
    def in_last_pass(self) -> bool:
        """Whether no pass follows that a capture has to wait for."""
        ...

    def moment(self, arguments: dict[str, Any]) -> Moment:
        """Where the pass is that `net` is called for with these keyword arguments."""
        ...

    def sites(self) -> list[Site]:
        """Every site that has a name of its own."""
        ...

    def hook_point(self, site: Site) -> tuple[nn.Module, HookSide]:
        """The module that the site's tensor passes by, and on which side of it.

        Raises `UserError` where the model has no such site.
        """
        ...

    def read(self, site: Site, raw: Any) -> Float[Tensor, "*lead d"]:
        """The site's tensor `[b, t, d]` out of what its module took or gave.

        Raises `UserError` where that is no tensor of floats.
        """
        ...

    def write(self, site: Site, raw: Any, new: Tensor) -> Any:
        """What the module took or gave, with the site's tensor replaced by `new`."""
        ...

    def try_out(self) -> None:
        """Run something small, so that hooks see their tensors."""
        ...


def module_at(root: nn.Module, site: Site, spec: str) -> nn.Module:
    """The module that a `module` site names. Raises `UserError` where there is none."""
    assert site.path is not None
    try:
        return root.get_submodule(site.path)
    except AttributeError as error:
        children = ", ".join(name for name, _ in root.named_children())
        raise UserError(
            f"site {site} names no module of {spec} ({error}); paths start with one of: {children}."
        ) from error


def floats_of(site: Site, raw: Any) -> Float[Tensor, "*shape"]:
    """The tensor that a module took or gave: itself or, of several things, the first.

    Raises `UserError` where that is no tensor of floats.
    """
    tensor = raw[0] if isinstance(raw, tuple | list) and raw else raw
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise UserError(
            f"site {site} gives {type(tensor).__name__} where a tensor of floats was wanted; "
            "choose a module that returns one."
        )
    return tensor


def with_floats(raw: Any, new: Tensor) -> Any:
    """What a module took or gave, with `new` in the place of what `floats_of` finds there."""
    if isinstance(raw, tuple):
        return (new, *raw[1:])
    if isinstance(raw, list):
        return [new, *raw[1:]]
    return new


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first input of a module: its first positional argument, else `hidden_states`."""
    return args[0] if args else kwargs.get("hidden_states")
