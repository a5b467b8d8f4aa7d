"""Changing activations while a model runs.

    with editing(model, site, lambda x: 0 * x):
        logits = model.run(tokens)

The function sees the site's tensor as `[b, t, d]` and gives the one to go on with. Edits of several
sites nest as `with` blocks do; the hook is removed also when the forward pass raises.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from probe.capture import add_hook
from probe.language import LanguageModel, hidden_input
from probe.sites import Site

Change = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]


@contextlib.contextmanager
def editing(model: LanguageModel, site: Site, change: Change) -> Iterator[None]:
    """Replace the site's tensor by `change(tensor)` in every pass run inside the block.

    For an `update` site (output minus input) the module's output becomes input plus the change.

    Raises:
        UserError: the site is not in the model.
    """
    module, side = model.hook_point(site)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], raw: Any) -> Any:
        tensor = model.read(site, raw)
        if site.tensor != "update":
            return model.write(site, raw, change(tensor))
        entering = model.read(site, hidden_input(args, kwargs))
        return model.write(site, raw, entering + change(tensor - entering))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = change(model.read(site, hidden_input(args, kwargs)))
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    handle = add_hook(module, side, before, after)
    try:
        yield
    finally:
        handle.remove()
