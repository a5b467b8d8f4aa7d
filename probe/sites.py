"""Sites: where in a model an activation is read or changed.

Grammar, for a language model with layers counted from 0 (`L`):

    resid_pre.L     residual stream entering block L          [.., d_model]
    resid_post.L    residual stream leaving block L           [.., d_model]
    attn_out.L      what attention adds to the stream         [.., d_model]
    mlp_out.L       what the MLP adds to the stream           [.., d_model]
    mlp_act.L       hidden units of the MLP (gated where the model gates)   [.., d_mlp]
    head_out.L      attention heads' outputs, concatenated, before the output projection
    module:PATH     output of any `nn.Module` by its dotted path; `module:PATH:input` its first
                    input, `module:PATH:update` its output minus its input

Globs (`resid_post.*`, `*.12`) stand for every site of the model that they match.
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from probe.errors import UserError

Kind = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act", "head_out", "module"]
TensorKind = Literal["input", "output", "update"]

LAYER_KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "module")
GRAMMAR = (
    "resid_pre.L, resid_post.L, attn_out.L, mlp_out.L, mlp_act.L, head_out.L with L a layer "
    "counted from 0, or module:<dotted path>[:input|:output|:update]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place in a model. `str(site)` is its canonical name and `parse_site` reads it back."""

    kind: Kind
    """Which tensor, in the grammar above."""
    layer: int | None = None
    """Block number counted from 0; None for `module` sites."""
    path: str | None = None
    """Dotted module path of a `module` site; None for the others."""
    tensor: TensorKind = "output"
    """Which of the module's tensors a `module` site means."""

    def __str__(self) -> str:
        if self.kind != "module":
            return f"{self.kind}.{self.layer}"
        return f"module:{self.path}" + ("" if self.tensor == "output" else f":{self.tensor}")

    @property
    def folder(self) -> str:
        """The site's name as a folder name: characters that file systems dislike become `_`."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", str(self))


def parse_site(text: str) -> Site:
    """Read a site's name. Raises `UserError` where it is not in the grammar."""
    if text.startswith("module:"):
        path, colon, tensor = text.removeprefix("module:").partition(":")
        if path and (not colon or tensor in get_args(TensorKind)):
            return Site(kind="module", path=path, tensor=tensor or "output")  # type: ignore[arg-type]
    kind, _, layer = text.partition(".")
    if kind in LAYER_KINDS and layer.isdecimal():
        return Site(kind=kind, layer=int(layer))
    raise UserError(f"site {text!r} is not known: wanted {GRAMMAR}.")


def expand_sites(patterns: Sequence[str], available: Sequence[Site]) -> list[Site]:
    """Sites of a model that the patterns name, in the order given, without repeats.

    Raises `UserError` where a pattern matches none of `available`; `module:` names without a glob
    are let through, since the model itself checks the path.
    """
    if not patterns:
        raise UserError(f"no site was given: wanted at least one of {GRAMMAR}.")
    names = {str(site): site for site in available}
    found: dict[str, Site] = {}
    for pattern in patterns:
        if pattern.startswith("module:") and not any(mark in pattern for mark in "*?["):
            site = parse_site(pattern)
            found[str(site)] = site
            continue
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched and not available:
            raise UserError(
                f"site {pattern!r} is not in this model, whose layers are not known by name: "
                "give it any module:<dotted path>."
            )
        if not matched:
            if not fnmatch.filter(LAYER_KINDS, pattern.partition(".")[0]):
                parse_site(pattern)
            raise UserError(
                f"site {pattern!r} is not in this model, which has {available[0]} to "
                f"{available[-1]} and any module:<dotted path>."
            )
        found |= {name: names[name] for name in matched}
    return list(found.values())
