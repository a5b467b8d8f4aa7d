"""Changing activations while a model runs.

    with editing(model, site, lambda x: 0 * x):
        logits = model.run(tokens)

    with applying(model, edits):
        logits = model.run(tokens)              # or probe.generation.generate
        image = model.generate(prompts, seeds)  # of an image model

`editing` takes any function of the site's tensor `[b, t, d]`. `applying` takes `Edit`s: what is
changed, as data. An edit reads some numbers `c` of the activation `x` at each position (its
component: one coordinate along a direction, or some channels), makes new ones of them (its
operation), and adds what that changes, `x + delta`: whatever of `x` the component does not describe
stays, so what a dictionary cannot reconstruct is kept.

    add          c + value                  scale        value c
    set          value                      clamp        c held within [-|value|, |value|]
    zero         0                          mean_ablate  value, the mean over reference text
    patch        value, from another run
    project_out  0, where c is the projection on the coordinate's vector whatever reads it

All edits of one site read the same, unedited `x` and their changes are added: their order does not
matter. Where an edit is made its `where` says: of text, at some tokens (each pass finds out which
positions it is at from the model's key-value cache, so that generation with and without a cache
edits the same tokens); of images, at some places of the feature map, with weights, in a range of
denoising steps and in chosen rows of guidance. Hooks are removed also when the forward pass raises.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probe.adapters import HookSide, Model, Moment, hidden_input
from probe.capture import add_hook
from probe.errors import UserError
from probe.sites import Site

Change = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]
Read = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t w"]]
Rows = Literal["conditional", "unconditional", "both", "opposed"]
Op = Literal["add", "set", "scale", "clamp", "zero", "mean_ablate", "patch", "project_out"]
START = Moment()


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
class Coordinates:
    """Several numbers of an activation, each with a direction of its own: features of an SAE."""

    vectors: Float[Tensor, "w d"]
    """What one unit more of each adds to the activation; float32."""
    read: Read
    """The numbers."""

    def values(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t w"]:
        """The numbers at each position; float32."""
        return self.read(x)

    def spread(
        self, change: Float[Tensor, "b t w"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """What a change of the numbers adds to the activation."""
        return change @ self.vectors.to(x.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What a dictionary leaves out of an activation: without it, its reconstruction is left."""

    rebuild: Read
    """The reconstruction, as wide as the activation; float32."""

    def values(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Activation minus reconstruction; float32."""
        return x.float() - self.rebuild(x)

    def spread(
        self, change: Float[Tensor, "b t d"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """The change itself."""
        return change


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """Some channels of an activation, wherever they are: neurons."""

    channels: Int[Tensor, " w"]
    """Their numbers, each once."""

    def values(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t w"]:
        """The channels at each position; float32."""
        return x[..., self.channels.to(x.device)].float()

    def spread(
        self, change: Float[Tensor, "b t w"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """What a change of the channels adds to the activation."""
        whole = torch.zeros(x.shape, device=x.device)
        whole[..., self.channels.to(x.device)] = change
        return whole


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

    component: "Coordinate | Coordinates | Channels | Picked | Rest"
    """What is read, and would have been changed."""
    direction: Float[Tensor, " d"]
    """Where its change goes instead; of length 1."""

    def values(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t w"]:
        """The numbers that are read; float32."""
        return self.component.values(x)

    def projection(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
        """The coordinate along the vector that would have been changed."""
        assert isinstance(self.component, Coordinate), "only a coordinate has a vector"
        return self.component.projection(x)

    def spread(
        self, change: Float[Tensor, "b t w"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """As long as the change would have been, with the sign of a coordinate's change."""
        direction = self.direction.to(x.device)
        if isinstance(self.component, Coordinate):
            return change * self.component.vector.norm() * direction
        return change.norm(dim=-1, keepdim=True) * direction


Plain = Coordinate | Coordinates | Channels | Picked | Rest
Component = Plain | Turned


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which tokens are edited: those of the prompt by position, generated ones by step.

    Step 0 reads the prompt; step n reads the n-th generated token. Positions count from 0.
    """

    prompt: Bool[Tensor, " t"]
    """For each token of the prompt, whether it is edited."""
    steps: tuple[int, int | None] = (1, 1)
    """First step, and one past the last (None: no end), whose generated tokens are edited."""

    rows: ClassVar[Rows] = "conditional"

    def chosen(self, offset: int, n: int) -> Bool[Tensor, " n"]:
        """Whether each of `n` tokens from position `offset` on is edited."""
        inside = self.prompt[offset : offset + n]
        step = offset + len(inside) - len(self.prompt) + 1
        steps = range(step, step + n - len(inside))
        first, end = self.steps
        after = [first <= step and (end is None or step < end) for step in steps]
        return torch.cat([inside, torch.tensor(after, dtype=torch.bool)])

    def weights(self, moment: Moment, n: int) -> Float[Tensor, " n"]:
        """The same as weights: 1 for a token that is edited."""
        return self.chosen(moment.offset, n).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Which places of an image's feature map are edited, at which steps, in which rows.

    Under guidance a pass has a row that reads the prompt and one that reads nothing. `conditional`
    changes the first, `unconditional` the second, `both` both; `opposed` adds the change to the
    first and takes it off the second, which guidance then pulls apart (as sdxl-unbox does by
    default on SDXL base). Without guidance all rows are conditional.
    """

    mask: Float[Tensor, " t"] | None = None
    """What the change is multiplied by at each place (`y * width + x`); None for 1 everywhere."""
    steps: tuple[int, int | None] = (0, None)
    """First denoising step, and one past the last (None: no end)."""
    rows: Rows = "conditional"
    """Which rows."""

    def weights(self, moment: Moment, n: int) -> Float[Tensor, " n"]:
        """The weight of each of the `n` places of a pass.

        Raises `UserError` where the mask is of another number of places.
        """
        first, end = self.steps
        if moment.step < first or (end is not None and moment.step >= end):
            return torch.zeros(n)
        if self.mask is None:
            return torch.ones(n)
        if len(self.mask) != n:
            raise UserError(
                f"the mask has {len(self.mask)} places and the site has {n}; give one of the "
                "site's own grid."
            )
        return self.mask.float().cpu()


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change at one site."""

    site: Site
    """Where."""
    component: Component
    """Which numbers of the activation are changed."""
    op: Op
    """How; see the module's table."""
    where: Where | Places
    """At which tokens, or at which places and steps."""
    value: Float[Tensor, "*t w"] = field(default_factory=lambda: torch.zeros(1))
    """What the operation needs, in the units of the numbers: one set of them [w], one for each
    token of the prompt [t, w], or one for each step and place of an image [s, t, w]. `zero` and
    `project_out` need none."""
    row: int | None = None
    """The row of the batch that is changed (of guided images: the image); None for all."""

    def rows(self, n: int, moment: Moment) -> list[tuple[int, int, int]]:
        """The rows of a batch of `n` that are changed: first, one past the last, sign."""
        middle = moment.n_unconditional
        conditional, unconditional = (middle, n, 1), (0, middle, 1)
        chosen = {
            "conditional": [conditional],
            "unconditional": [unconditional],
            "both": [unconditional, conditional],
            "opposed": [(0, middle, -1), conditional],
        }[self.where.rows]
        if self.row is not None:
            chosen = [
                (first + self.row, first + self.row + 1, sign)
                for first, end, sign in chosen
                if first + self.row < end
            ]
        return [part for part in chosen if part[0] < part[1]]

    def delta(
        self, x: Float[Tensor, "b t d"], moment: Moment = START
    ) -> Float[Tensor, "b t d"] | None:
        """What is to be added to `x` in a pass at `moment`; None for nothing.

        Which rows of the batch are meant is not looked at.
        """
        weights = self.where.weights(moment, x.shape[1])
        if not weights.any():
            return None
        change = self._change(x, moment)
        if not (weights == 1).all():
            change = change * weights.to(x.device)[:, None]
        return self.component.spread(change, x)

    def _change(self, x: Float[Tensor, "b t d"], moment: Moment) -> Float[Tensor, "b t w"]:
        value = self._value(x, moment)
        if self.op == "add":
            return value.expand(*x.shape[:2], -1)
        if self.op == "project_out":
            assert isinstance(self.component, Coordinate | Turned), "the others are zeroed instead"
            return -self.component.projection(x)
        old = self.component.values(x)
        new = {
            "patch": lambda: value.expand_as(old),
            "set": lambda: value.expand_as(old),
            "mean_ablate": lambda: value.expand_as(old),
            "scale": lambda: value * old,
            "clamp": lambda: torch.minimum(torch.maximum(old, -value.abs()), value.abs()),
            "zero": lambda: torch.zeros_like(old),
        }[self.op]()
        return new - old

    def _value(self, x: Float[Tensor, "b t d"], moment: Moment) -> Float[Tensor, "*t w"]:
        """The value of this pass: [w], or [t, w] as long as the pass."""
        if self.value.ndim == 3:
            return self.value[moment.step].to(x.device)
        if self.value.ndim == 2:
            here = self.value[moment.offset : moment.offset + x.shape[1]]
            return nn.functional.pad(here, (0, 0, 0, x.shape[1] - len(here))).to(x.device)
        return self.value.to(x.device)


def edited(
    x: Float[Tensor, "b t d"], edits: Sequence[Edit], moment: Moment = START
) -> Float[Tensor, "b t d"]:
    """An activation with all edits made; they are taken to be of its site. Keeps its dtype.

    Args:
        x: the activation.
        edits: what to change.
        moment: where the pass is.
    """
    total: Tensor | None = None
    # The same tensor for all edits of the same rows: an SAE that they read encodes it once.
    parts: dict[tuple[int, int], Tensor] = {}
    for edit in edits:
        for first, end, sign in edit.rows(len(x), moment):
            delta = edit.delta(parts.setdefault((first, end), x[first:end]), moment)
            if delta is None:
                continue
            if total is None:
                total = torch.zeros_like(x, dtype=torch.float32)
            total[first:end] += sign * delta
    return x if total is None else (x.float() + total).to(x.dtype)


@contextlib.contextmanager
def applying(model: Model, edits: Sequence[Edit]) -> Iterator[None]:
    """Make the edits in every pass run inside the block, where each of them says.

    Raises `UserError` where a site is not in the model.
    """
    moment = START

    def note_moment(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal moment
        moment = model.moment(kwargs)

    by_site: dict[Site, list[Edit]] = {}
    for edit in edits:
        by_site.setdefault(edit.site, []).append(edit)
    with contextlib.ExitStack() as stack:
        handle = model.net.register_forward_pre_hook(note_moment, with_kwargs=True)
        stack.callback(handle.remove)
        for site, here in by_site.items():
            stack.enter_context(editing(model, site, lambda x, here=here: edited(x, here, moment)))
        yield


@contextlib.contextmanager
def editing(model: Model, site: Site, change: Change) -> Iterator[None]:
    """Replace the site's tensor by `change(tensor)` in every pass run inside the block.

    For an `update` site (output minus input) the module's output becomes input plus the change.

    Raises:
        UserError: the site is not in the model.
    """
    module, side = model.hook_point(site)
    before = partial(_change_input, model, site, change)
    after = partial(_change_output, model, site, side, change)
    handle = add_hook(module, side, before, after)
    try:
        yield
    finally:
        handle.remove()


def _change_input(
    model: Model, site: Site, change: Change,
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    raw = hidden_input(args, kwargs)
    new = model.write(site, raw, change(model.read(site, raw)))
    if args:
        return (new, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": new}


def _change_output(
    model: Model, site: Site, side: HookSide, change: Change,
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], raw: Any,
) -> Any:  # fmt: skip
    tensor = model.read(site, raw)
    if side != "update":
        return model.write(site, raw, change(tensor))
    entering = model.read(site, hidden_input(args, kwargs))
    return model.write(site, raw, entering + change(tensor - entering))


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
