"""Sites: where in a model an activation is read or changed.

Grammar, for a language model with layers counted from 0 (`L`):

    resid_pre.L     residual stream entering block L          [.., d_model]
    resid_post.L    residual stream leaving block L           [.., d_model]
    attn_out.L      what attention adds to the stream         [.., d_model]
    mlp_out.L       what the MLP adds to the stream           [.., d_model]
    mlp_act.L       hidden units of the MLP (gated where the model gates)   [.., d_mlp]
    head_out.L      attention heads' outputs, concatenated, before the output projection

for a text-to-image U-Net, where a site is one of its attention blocks (a `Transformer2DModel`) and
`d` its channels, the places of the feature map standing in a row (place = y * width + x):

    down.B.A        what `unet.down_blocks.B.attentions.A` adds to its input: its update
    mid.A, up.B.A   the same of `unet.mid_block.attentions.A`, `unet.up_blocks.B.attentions.A`
    BLOCK:input     what enters the block; `BLOCK:output` what leaves it, input plus update;
                    `BLOCK:update` is the long name of `BLOCK`

and for any model:

    module:PATH     output of any `nn.Module` by its dotted path; `module:PATH:input` its first
                    input, `module:PATH:update` its output minus its input

Globs (`resid_post.*`, `*.12`, `up.*`, `up.*:input`) stand for every site that they match.
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from probe.errors import UserError

LayerKind = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act", "head_out"]
Kind = LayerKind | Literal["block", "module"]
TensorKind = Literal["input", "output", "update"]

LAYER_KINDS: tuple[LayerKind, ...] = get_args(LayerKind)
BLOCK = re.compile(r"(mid|(down|up)\.(0|[1-9][0-9]*))\.(0|[1-9][0-9]*)")
BLOCK_PATH = re.compile(r"unet\.(?:mid_block|(down|up)_blocks\.([0-9]+))\.attentions\.([0-9]+)")
GRAMMAR = (
    "resid_pre.L, resid_post.L, attn_out.L, mlp_out.L, mlp_act.L, head_out.L with L a layer "
    "counted from 0; down.B.A, mid.A, up.B.A with [:input|:output|:update] for an image model; or "
    "module:<dotted path>[:input|:output|:update]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place in a model. `str(site)` is its canonical name and `parse_site` reads it back."""

    kind: Kind
    """Which tensor, in the grammar above."""
    layer: int | None = None
    """Layer counted from 0 of a language model; None for `block` and `module` sites."""
    path: str | None = None
    """A `block`'s name (`down.2.1`) or a `module`'s dotted path; None for the others."""
    tensor: TensorKind = "output"
    """Which of the tensors of a `block` or a `module` is meant."""

    def __str__(self) -> str:
        if self.kind == "block":
            return f"{self.path}" + ("" if self.tensor == "update" else f":{self.tensor}")
        if self.kind == "module":
            return f"module:{self.path}" + ("" if self.tensor == "output" else f":{self.tensor}")
        return f"{self.kind}.{self.layer}"

    @property
    def of_images(self) -> bool:
        """Whether it is a place in an image model."""
        return self.kind == "block" or (self.path or "").startswith("unet.")

    @property
    def folder(self) -> str:
        """The site's name as a folder name: characters that file systems dislike become `_`."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", str(self))


def parse_site(text: str) -> Site:
    """Read a site's name. Raises `UserError` where it is not in the grammar."""
    path, colon, tensor = text.removeprefix("module:").partition(":")
    if path and (not colon or tensor in get_args(TensorKind)):
        if text.startswith("module:"):
            return Site(kind="module", path=path, tensor=tensor or "output")  # type: ignore[arg-type]
        if BLOCK.fullmatch(path):
            return Site(kind="block", path=path, tensor=tensor or "update")  # type: ignore[arg-type]
    kind, _, layer = text.partition(".")
    if kind in LAYER_KINDS and layer.isdecimal():
        return Site(kind=kind, layer=int(layer))
    raise UserError(f"site {text!r} is not known: wanted {GRAMMAR}.")


def block_of_path(path: str) -> str | None:
    """The name of the block at a dotted path of a pipeline; None where it is none.

    `unet.down_blocks.2.attentions.1` is `down.2.1`.
    """
    found = BLOCK_PATH.fullmatch(path)
    if found is None:
        return None
    return f"{found[1] or 'mid'}{'.' + found[2] if found[1] else ''}.{found[3]}"


def expand_sites(patterns: Sequence[str], available: Sequence[Site]) -> list[Site]:
    """Sites of a model that the patterns name, in the order given, without repeats.

    Raises `UserError` where a pattern matches none of `available`; `module:` names without a glob
    are let through, since the model itself checks the path.
    """
    if not patterns:
        raise UserError(f"no site was given: wanted at least one of {GRAMMAR}.")
    found: dict[str, Site] = {}
    for pattern in patterns:
        for site in _matching(pattern, available):
            found[str(site)] = site
    return list(found.values())


def _matching(pattern: str, available: Sequence[Site]) -> list[Site]:
    if pattern.startswith("module:") and not any(mark in pattern for mark in "*?["):
        return [parse_site(pattern)]
    name, _, tensor = pattern.partition(":")
    matched = [site for site in available if fnmatch.fnmatchcase(str(site), name)]
    if matched and tensor:
        return [parse_site(f"{site}:{tensor}") for site in matched]
    if matched:
        return matched
    if not available:
        raise UserError(
            f"site {pattern!r} is not in this model, whose layers are not known by name: "
            "give it any module:<dotted path>."
        )
    known = {*LAYER_KINDS, "down", "mid", "up"}
    if not fnmatch.filter(known, name.partition(".")[0]):
        parse_site(pattern)
    raise UserError(
        f"site {pattern!r} is not in this model, which has {named_sites(available)} and any "
        "module:<dotted path>."
    )


def named_sites(sites: Sequence[Site]) -> str:
    """A model's sites as a message names them: blocks one by one, layers from first to last."""
    if sites[0].kind == "block":
        return ", ".join(map(str, sites))
    return f"{sites[0]} to {sites[-1]}"
