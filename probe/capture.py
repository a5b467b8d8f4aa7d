"""Reading activations while a model runs.

    with capturing(model, sites) as seen:
        model.run(tokens)
    seen[site]          # [b, t, d]

Plain PyTorch hooks, one a site, on modules the adapter names. Once every site has been seen the
forward pass is stopped (early exit): layers above the last site cost nothing. Where one run is many
passes, as when an image is drawn in steps, only the last is stopped. Hooks are removed on the way
out, also when the forward pass raises.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probe.adapters import ForwardStopped, HookSide, Model, hidden_input
from probe.errors import UserError
from probe.sites import Site

Record = Callable[[Site, Tensor], None]


@contextlib.contextmanager
def capturing(
    model: Model, sites: Sequence[Site], *, early_exit: bool = True
) -> Iterator[dict[Site, Tensor]]:
    """Collect the sites' tensors of the forward passes run inside the block.

    Args:
        model: the adapter.
        sites: what to read; all are read in the same pass.
        early_exit: stop each run when the last site has been seen; it then gives None.

    Yields:
        A dict that holds the latest pass's tensors `[b, t, d]`, detached, in the model's dtype.

    Raises:
        UserError: a site is not in the model.
    """
    seen: dict[Site, Tensor] = {}
    waiting = set(sites)

    def record(site: Site, tensor: Tensor) -> None:
        if not waiting:
            waiting.update(sites)
            seen.clear()
        seen[site] = tensor.detach()
        waiting.discard(site)
        if early_exit and not waiting and model.in_last_pass:
            raise ForwardStopped

    with contextlib.ExitStack() as stack:
        for site in dict.fromkeys(sites):
            stack.enter_context(reading(model, site, record))
        yield seen


def site_widths(model: Model, sites: Sequence[Site]) -> dict[str, int]:
    """The sizes of the sites' last axes by the sites' names, found by trying the model out.

    Raises `UserError` where the model does not come by a site.
    """
    with torch.inference_mode(), capturing(model, sites) as seen:
        model.try_out()
    missing = [str(site) for site in sites if site not in seen]
    if missing:
        raise UserError(
            f"site {missing[0]} is not passed when {model.spec} runs; choose another site."
        )
    return {str(site): seen[site].shape[-1] for site in sites}


def site_width(model: Model, site: Site) -> int:
    """The size of the site's last axis, found by trying the model out."""
    return site_widths(model, [site])[str(site)]


@contextlib.contextmanager
def reading(model: Model, site: Site, record: Record) -> Iterator[None]:
    """Call `record(site, tensor)` each time the site's tensor passes by inside the block."""
    module, side = model.hook_point(site)
    before = partial(_record_input, model, site, record)
    after = partial(_record_output, model, site, side, record)
    handle = add_hook(module, side, before, after)
    try:
        yield
    finally:
        handle.remove()


def _record_input(
    model: Model, site: Site, record: Record,
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
) -> None:  # fmt: skip
    record(site, model.read(site, hidden_input(args, kwargs)))


def _record_output(
    model: Model, site: Site, side: HookSide, record: Record,
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], raw: Any,
) -> None:  # fmt: skip
    tensor = model.read(site, raw)
    if side == "update":
        tensor = tensor - model.read(site, hidden_input(args, kwargs))
    record(site, tensor)


def add_hook(module: nn.Module, side: HookSide, before: Callable, after: Callable) -> Any:
    """Hang `before` in front of the module or `after` behind it, by side; gives the handle."""
    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)
