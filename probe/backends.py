"""The same activations through three ways in.

    native              PyTorch hooks with early exit (`probe.capture`); the default
    transformer_lens    TransformerLens 4, `TransformerBridge`
                        (github.com/TransformerLensOrg/TransformerLens)
    nnsight             nnsight 0.8 (Fiotto-Kaufman et al. 2024, arXiv 2407.14561)

    capture(model, sites, tokens, backend="nnsight")[site]     # [b, t, d]
    run_edited(model, tokens, edits, backend="nnsight")        # logits [b, t, v]

The two libraries are optional (`pip install lorgnette[backends]`) and imported on first use. Both
rebuild the module tree they are given: TransformerLens puts its components in place of the
submodules, nnsight replaces their `forward`. They are given a twin of the model: its own modules
and its own config around the very same weight tensors, so that nothing is loaded twice and the
model itself stays as it was. Edits in force (`probe.interventions.applying`) are the native way's
business: wrap a model outside such blocks, and give edits to `run_edited`.

TransformerLens runs without compatibility mode, that is with raw weights: its default there (norms
folded in, weights centred) is another function with other activations. It computes attention by
itself, so its values equal ours up to rounding; nnsight runs the model's own code, so its values
are the same bits.

Importing them changes the process: transformer_lens lets integers pass for floats in Hugging Face
configs; nnsight gives every Python object a method `save`, and empties the C++ part of torch's
error messages.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.adapters import hidden_input
from probe.capture import capturing
from probe.errors import UserError
from probe.interventions import Edit, applying, edited
from probe.language import LanguageModel
from probe.sites import Kind, Site

Backend = Literal["native", "transformer_lens", "nnsight"]
Capture = Callable[[Int[Tensor, "b t"]], dict[Site, Tensor]]

HOOK_NAMES: dict[Kind, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_act": "mlp.hook_post",
    "head_out": "attn.hook_z",
}
"""TransformerLens's names inside a block, which other tools (SAELens) have adopted."""


def capture(
    model: LanguageModel,
    sites: Sequence[Site],
    tokens: Int[Tensor, "b t"],
    *,
    backend: Backend = "native",
) -> dict[Site, Tensor]:
    """The sites' tensors `[b, t, d]` of one batch of token rows, in the model's dtype.

    Raises `UserError` as `make_capture` does.
    """
    return make_capture(model, sites, backend)(tokens)


def make_capture(
    model: LanguageModel, sites: Sequence[Site], backend: Backend = "native"
) -> Capture:
    """A function from token rows `[b, t]` to the sites' tensors; the model is wrapped once.

    Raises:
        UserError: the backend is unknown or not installed, a site is not in the model, the backend
            cannot read it or reads another tensor under its name, or (when the function is called)
            the forward pass does not come by it.
    """
    maker = _maker(backend)
    for site in sites:
        model.hook_point(site)
    read = maker(model, list(dict.fromkeys(sites)))

    def run(tokens: Int[Tensor, "b t"]) -> dict[Site, Tensor]:
        with torch.no_grad():
            seen = read(tokens.to(model.device))
        for site in sites:
            if site not in seen:
                raise UserError(
                    f"site {site} was never reached: the forward pass of {model.spec} does not "
                    "call that module; choose one that it calls."
                )
        return {site: seen[site] for site in sites}

    return run


def run_edited(
    model: LanguageModel,
    tokens: Int[Tensor, "b t"],
    edits: Sequence[Edit],
    *,
    backend: Backend = "native",
) -> Float[Tensor, "b t v"]:
    """Logits of one pass with edits made, by any of the three ways in.

    Raises `UserError` where the backend is unknown or not installed, or cannot reach a site.
    """
    _maker(backend)
    by_site: dict[Site, list[Edit]] = {}
    for edit in edits:
        by_site.setdefault(edit.site, []).append(edit)
        model.hook_point(edit.site)
    runs = {
        "native": _native_run,
        "transformer_lens": _transformer_lens_run,
        "nnsight": _nnsight_run,
    }
    with torch.no_grad():
        return runs[backend](model, tokens.to(model.device), by_site)


def _native_run(
    model: LanguageModel, tokens: Int[Tensor, "b t"], by_site: Mapping[Site, Sequence[Edit]]
) -> Tensor:
    with applying(model, [edit for edits in by_site.values() for edit in edits]):
        logits = model.run(tokens)
    assert logits is not None, "no capture is active, so the pass ran to its end"
    return logits


def _transformer_lens_run(
    model: LanguageModel, tokens: Int[Tensor, "b t"], by_site: Mapping[Site, Sequence[Edit]]
) -> Tensor:
    bridge = make_bridge(model)

    def hook_of(edits: Sequence[Edit]) -> Callable[..., Tensor]:
        def hook(value: Tensor, hook: Any) -> Tensor:
            # Attention heads come as [b, t, head, d_head]; ours are side by side.
            return edited(value.flatten(2), edits).reshape(value.shape)

        return hook

    hooks = []
    for site, edits in by_site.items():
        name = transformer_lens_name(site)
        _check_same_place(model, bridge, site, name)
        hooks.append((name, hook_of(edits)))
    return bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")


def _nnsight_run(
    model: LanguageModel, tokens: Int[Tensor, "b t"], by_site: Mapping[Site, Sequence[Edit]]
) -> Tensor:
    net = make_nnsight(model)
    paths = {id(module): path for path, module in model.model.named_modules()}
    # nnsight wants modules in the order in which the forward pass comes by them.
    places = sorted(
        ((paths[id(model.hook_point(site)[0])], site) for site in by_site),
        key=lambda place: list(paths.values()).index(place[0]),
    )
    with net.trace(input_ids=tokens, use_cache=False):
        for path, site in places:
            envoy = net.get(path)
            if model.hook_point(site)[1] == "input":
                envoy.input = edited(envoy.input, by_site[site])
                continue
            # What an update site leaves as it is; nnsight wants inputs read before outputs.
            stays = model.read(site, envoy.input) if site.tensor == "update" else 0
            raw = envoy.output
            new = stays + edited(model.read(site, raw) - stays, by_site[site])
            envoy.output = model.write(site, raw, new)
        logits = net.output.logits.save()
    return logits


def _maker(backend: str) -> Callable[[LanguageModel, Sequence[Site]], Capture]:
    makers = {
        "native": _native_capture,
        "transformer_lens": _transformer_lens_capture,
        "nnsight": _nnsight_capture,
    }
    if backend not in makers:
        raise UserError(f"backend {backend!r} is not known: wanted one of {', '.join(makers)}.")
    return makers[backend]


def transformer_lens_name(site: Site) -> str:
    """The site's TransformerLens hook, e.g. `blocks.12.hook_resid_post` for `resid_post.12`.

    Raises `UserError` for sites without a layer, which have none.
    """
    if site.kind == "module" or site.kind == "block":
        raise UserError(
            f"site {site} has no TransformerLens name: wanted one of {', '.join(HOOK_NAMES)} "
            "with a layer; the backends native and nnsight read any module."
        )
    return f"blocks.{site.layer}.{HOOK_NAMES[site.kind]}"


def make_bridge(model: LanguageModel) -> Any:
    """TransformerLens's `TransformerBridge` on the model's own weights, none of them processed.

    It takes token ids; it has no tokenizer. Raises `UserError` where TransformerLens is not
    installed or does not know the architecture.
    """
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        raise _not_installed("transformer_lens", "transformer-lens", error) from error
    twin = make_twin(model.model)
    architecture = type(model.model).__name__
    try:
        return build_bridge_from_module(
            twin, architecture, hf_config=copy.deepcopy(twin.config), model_name=model.spec
        )
    except ValueError as error:
        raise UserError(
            f"TransformerLens does not know the architecture of {model.spec} ({architecture}); "
            "use the backend native or nnsight."
        ) from error


def make_nnsight(model: LanguageModel) -> Any:
    """nnsight's `NNsight` on the model's own weights; `.trace(input_ids=...)` runs it.

    Raises `UserError` where nnsight is not installed.
    """
    try:
        from nnsight import NNsight
    except ImportError as error:
        raise _not_installed("nnsight", "nnsight", error) from error
    return NNsight(make_twin(model.model))


def make_twin(model: nn.Module) -> Any:
    """A copy of a model's modules and config around the same parameter and buffer tensors."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _native_capture(model: LanguageModel, sites: Sequence[Site]) -> Capture:
    def read(tokens: Int[Tensor, "b t"]) -> dict[Site, Tensor]:
        with capturing(model, sites) as seen:
            model.run(tokens)
        return seen

    return read


def _transformer_lens_capture(model: LanguageModel, sites: Sequence[Site]) -> Capture:
    names = {site: transformer_lens_name(site) for site in sites}
    bridge = make_bridge(model)
    for site, name in names.items():
        _check_same_place(model, bridge, site, name)
    stop = max((site.layer for site in sites if site.layer is not None), default=-1) + 1

    def read(tokens: Int[Tensor, "b t"]) -> dict[Site, Tensor]:
        _, seen = bridge.run_with_cache(
            tokens,
            names_filter=list(names.values()),
            stop_at_layer=stop if stop < model.n_layers else None,
            return_cache_object=False,
            return_type=None,
            use_cache=False,
            output_attentions=False,
        )
        # Attention heads come as [b, t, head, d_head]; ours are side by side.
        return {site: seen[name].flatten(2) for site, name in names.items() if name in seen}

    return read


def _check_same_place(model: LanguageModel, bridge: Any, site: Site, name: str) -> None:
    """Raise `UserError` unless a TransformerLens hook hangs on the side of the module we read.

    A bridge keeps the wrapped tree's paths, with its components in the modules' places.
    """
    module, side = model.hook_point(site)
    path = next(path for path, other in model.model.named_modules() if other is module)
    ours = bridge.original_model.get_submodule(path)
    hook = bridge.hook_dict.get(name)
    owner, _, end = ("", "", "") if hook is None else hook.name.rpartition(".")
    theirs = bridge.get_submodule(owner)
    same_module = any(ours is one for one in (theirs, getattr(theirs, "original_component", None)))
    if not same_module or end != {"input": "hook_in", "output": "hook_out"}[side]:
        raise UserError(
            f"site {site} of {model.spec} is the {side} of {path}, and TransformerLens has "
            f"{'nothing' if hook is None else 'another tensor'} under {name}; "
            "use the backend native or nnsight."
        )


def _nnsight_capture(model: LanguageModel, sites: Sequence[Site]) -> Capture:
    net = make_nnsight(model)
    paths = {id(module): path for path, module in model.model.named_modules()}
    places = {site: f"{net.path}.{paths[id(model.hook_point(site)[0])]}" for site in sites}

    def read(tokens: Int[Tensor, "b t"]) -> dict[Site, Tensor]:
        modules = list(places.values())
        # nnsight compiles the block's source and runs it beside the model.
        with net.trace(input_ids=tokens, use_cache=False) as tracer:
            cache = tracer.cache(modules=modules, device=None, include_inputs=True)
        reached = {site: place for site, place in places.items() if place in cache}
        return {site: _from_visit(model, site, cache[place]) for site, place in reached.items()}

    return read


def _from_visit(model: LanguageModel, site: Site, visits: Any) -> Tensor:
    """The site's tensor out of nnsight's record of a module, at its first call in the pass."""
    once = len(visits) == 1
    arguments = visits.inputs if once else visits.inputs[0]
    entering = hidden_input(*arguments)
    if site.tensor == "input" or model.hook_point(site)[1] == "input":
        return model.read(site, entering)
    leaving = model.read(site, visits.output if once else visits.output[0])
    return leaving - model.read(site, entering) if site.tensor == "update" else leaving


def _not_installed(module: str, package: str, error: ImportError) -> UserError:
    return UserError(
        f"the backend {module} needs the package {package}, which cannot be imported ({error}); "
        "install it with: pip install lorgnette[backends]"
    )
