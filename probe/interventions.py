"""Changing activations while a model runs.

    with editing(model, site, lambda x: 0 * x):
        logits = model.run(tokens)

    with applying(model, edits):
        logits = model.run(tokens)              # or probe.generation.generate

`editing` takes any function of the site's tensor `[b, t, d]`. `applying` takes `Edit`s: what is
changed, as data. An edit reads some numbers `c` of the activation `x` at each position (its
component: one coordinate along a direction, or some channels), makes new ones of them (its
operation), and adds what that changes, `x + delta`: whatever of `x` the component does not describe
stays, so what a dictionary cannot reconstruct is kept.

    add          c + value                  scale        value c
    set          value                      clamp        c held within [-|value|, |value|]
    zero         0                          mean_ablate  value, the mean over reference text
    patch        value at each position, from another run
    project_out  0, where c is the projection on the coordinate's vector whatever reads it

All edits of one site read the same, unedited `x` and their changes are added: their order does not
matter. Each pass finds out which positions it is at from the model's key-value cache, so that
generation with and without a cache edits the same tokens. Hooks are removed also when the forward
pass raises.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probe.adapters import Model, hidden_input
from probe.capture import add_hook
from probe.errors import UserError
from probe.sites import Site

Change = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]
Read = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t 1"]]
Op = Literal["add", "set", "scale", "clamp", "zero", "mean_ablate", "patch", "project_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinate:
    """One number of an activation, and the direction in which changing it moves the activation."""

    vector: Float[Tensor, " d"]
    """What one unit more adds to the activation; float32."""
    read: Read | None = None
    """The number; None for the coordinate along the vector, `x . v / |v|^2`."""

    def values(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
        """The number at each position; float32."""
        return self.projection(x) if self.read is None else self.read(x)

    def projection(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
        """The coordinate along the vector, whatever reads the number."""
        vector = self.vector.to(x.device)
        return ((x.float() @ vector) / vector.square().sum())[..., None]

    def spread(
        self, change: Float[Tensor, "b t 1"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """What a change of the number adds to the activation."""
        return change * self.vector.to(x.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """Neighbouring channels of an activation: a neuron, a head, or the whole site."""

    start: int
    """The first of them."""
    stop: int
    """One past the last of them."""

    def values(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t w"]:
        """The channels at each position; float32."""
        return x[..., self.start : self.stop].float()

    def spread(
        self, change: Float[Tensor, "b t w"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """What a change of the channels adds to the activation."""
        return nn.functional.pad(change, (self.start, x.shape[-1] - self.stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turned:
    """A change of the same size in another direction: the control of matched norm."""

    component: Coordinate | Channels
    """What is read, and would have been changed."""
    direction: Float[Tensor, " d"]
    """Where its change goes instead; of length 1."""

    def values(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t w"]:
        """The numbers that are read; float32."""
        return self.component.values(x)

    def projection(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
        """The coordinate along the vector that would have been changed."""
        assert isinstance(self.component, Coordinate), "channels have no vector"
        return self.component.projection(x)

    def spread(
        self, change: Float[Tensor, "b t w"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """As long as the change would have been, with the sign of a coordinate's change."""
        direction = self.direction.to(x.device)
        if isinstance(self.component, Coordinate):
            return change * self.component.vector.norm() * direction
        return change.norm(dim=-1, keepdim=True) * direction


Component = Coordinate | Channels | Turned


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which tokens are edited: those of the prompt by position, generated ones by step.

    Step 0 reads the prompt; step n reads the n-th generated token. Positions count from 0.
    """

    prompt: Bool[Tensor, " t"]
    """For each token of the prompt, whether it is edited."""
    steps: tuple[int, int | None] = (1, 1)
    """First step, and one past the last (None: no end), whose generated tokens are edited."""

    def chosen(self, offset: int, n: int) -> Bool[Tensor, " n"]:
        """Whether each of `n` tokens from position `offset` on is edited."""
        inside = self.prompt[offset : offset + n]
        step = offset + len(inside) - len(self.prompt) + 1
        steps = range(step, step + n - len(inside))
        first, end = self.steps
        after = [first <= step and (end is None or step < end) for step in steps]
        return torch.cat([inside, torch.tensor(after, dtype=torch.bool)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change at one site."""

    site: Site
    """Where."""
    component: Component
    """Which numbers of the activation are changed."""
    op: Op
    """How; see the module's table."""
    where: Where
    """At which tokens."""
    value: Float[Tensor, "*t w"] = field(default_factory=lambda: torch.zeros(1))
    """What the operation needs, in the units of the numbers: one set of them, or, to patch, one
    for each token of the prompt. `zero` and `project_out` need none."""
    row: int | None = None
    """The row of the batch that is changed; None for all."""

    def delta(self, x: Float[Tensor, "b t d"], offset: int = 0) -> Float[Tensor, "b t d"] | None:
        """What is to be added to `x`, whose first token has position `offset`; None for nothing.

        The row of the batch is not looked at.
        """
        chosen = self.where.chosen(offset, x.shape[1])
        if not chosen.any():
            return None
        change = self._change(x, offset)
        if not chosen.all():
            change = change * chosen.to(x.device)[:, None]
        return self.component.spread(change, x)

    def _change(self, x: Float[Tensor, "b t d"], offset: int) -> Float[Tensor, "b t w"]:
        value = self.value.to(x.device)
        if self.op == "add":
            return value.expand(*x.shape[:2], -1)
        if self.op == "project_out":
            assert not isinstance(self.component, Channels), "channels are zeroed instead"
            return -self.component.projection(x)
        old = self.component.values(x)
        if self.op == "patch":
            rows = value[offset : offset + x.shape[1]]
            return nn.functional.pad(rows, (0, 0, 0, x.shape[1] - len(rows))) - old
        new = {
            "set": lambda: value.expand_as(old),
            "mean_ablate": lambda: value.expand_as(old),
            "scale": lambda: value * old,
            "clamp": lambda: torch.minimum(torch.maximum(old, -value.abs()), value.abs()),
            "zero": lambda: torch.zeros_like(old),
        }[self.op]()
        return new - old


def edited(
    x: Float[Tensor, "b t d"], edits: Sequence[Edit], offset: int = 0
) -> Float[Tensor, "b t d"]:
    """An activation with all edits made; they are taken to be of its site. Keeps its dtype.

    Args:
        x: the activation.
        edits: what to change.
        offset: the position of its first token.
    """
    total: Tensor | None = None
    for edit in edits:
        rows = x if edit.row is None else x[edit.row : edit.row + 1]
        delta = edit.delta(rows, offset)
        if delta is None:
            continue
        if total is None:
            total = torch.zeros_like(x, dtype=torch.float32)
        here = slice(None) if edit.row is None else slice(edit.row, edit.row + 1)
        total[here] += delta
    return x if total is None else x + total.to(x.dtype)


@contextlib.contextmanager
def applying(model: Model, edits: Sequence[Edit]) -> Iterator[None]:
    """Make the edits in every pass run inside the block, at the positions that the pass is at.

    Raises `UserError` where a site is not in the model.
    """
    offset = 0

    def note_offset(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal offset
        cache = kwargs.get("past_key_values")
        offset = 0 if cache is None else int(cache.get_seq_length())

    by_site: dict[Site, list[Edit]] = {}
    for edit in edits:
        by_site.setdefault(edit.site, []).append(edit)
    with contextlib.ExitStack() as stack:
        handle = model.net.register_forward_pre_hook(note_offset, with_kwargs=True)
        stack.callback(handle.remove)
        for site, here in by_site.items():
            stack.enter_context(editing(model, site, lambda x, here=here: edited(x, here, offset)))
        yield


@contextlib.contextmanager
def editing(model: Model, site: Site, change: Change) -> Iterator[None]:
    """Replace the site's tensor by `change(tensor)` in every pass run inside the block.

    For an `update` site (output minus input) the module's output becomes input plus the change.

    Raises:
        UserError: the site is not in the model.
    """
    module, side = model.hook_point(site)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], raw: Any) -> Any:
        tensor = model.read(site, raw)
        if side != "update":
            return model.write(site, raw, change(tensor))
        entering = model.read(site, hidden_input(args, kwargs))
        return model.write(site, raw, entering + change(tensor - entering))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raw = hidden_input(args, kwargs)
        new = model.write(site, raw, change(model.read(site, raw)))
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    handle = add_hook(module, side, before, after)
    try:
        yield
    finally:
        handle.remove()


# ------------------------------------------------------------------------------ which positions


def positions_of_text(texts: Sequence[str], wanted: str) -> Bool[Tensor, " t"]:
    """The tokens that an occurrence of some text reaches into.

    Args:
        texts: each token as it would be printed.
        wanted: the text to look for in what they spell together.

    Raises `UserError` where it does not occur.
    """
    whole, marked = "".join(texts), torch.zeros(len(texts), dtype=torch.bool)
    bounds = [0]
    for text in texts:
        bounds.append(bounds[-1] + len(text))
    start = whole.find(wanted) if wanted else -1
    if start < 0:
        raise UserError(f"the text {wanted!r} is not in the prompt {whole!r}; choose some that is.")
    while start >= 0:
        for place in range(len(texts)):
            marked[place] |= bounds[place] < start + len(wanted) and bounds[place + 1] > start
        start = whole.find(wanted, start + 1)
    return marked
