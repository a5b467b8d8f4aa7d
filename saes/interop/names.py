"""The same place in a model, in other projects' words.

    resid_post.8     blocks.8.hook_resid_post (TransformerLens, SAELens)     layers.8 (sparsify)
    mlp_out.8        blocks.8.hook_mlp_out                                   layers.8.mlp
    attn_out.8       blocks.8.hook_attn_out                                  layers.8.self_attn

sparsify and delphi name a module of the Hugging Face base model and mean its output; GPT-2 calls
its blocks `h`, other models `layers`.
"""

import re

from probe.backends import HOOK_NAMES
from probe.errors import UserError
from probe.sites import Site, parse_site

HOOK = re.compile(r"blocks\.(\d+)\.(\S+)")
MODULE = re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?")
IN_A_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.\w")
PARTS = {
    None: "resid_post",
    "mlp": "mlp_out",
    "self_attn": "attn_out",
    "attention": "attn_out",
    "attn": "attn_out",
}


def site_of_hook(hook_name: str) -> str | None:
    """Our name of a TransformerLens hook; None where we have none."""
    found = HOOK.fullmatch(hook_name)
    kinds = [kind for kind, hook in HOOK_NAMES.items() if found and hook == found[2]]
    return f"{kinds[0]}.{found[1]}" if found and kinds else None


def site_of_module(path: str) -> str | None:
    """Our name of the output of a Hugging Face module; None where it is not one of a block's."""
    found = MODULE.fullmatch(path)
    if found and found[2] in PARTS:
        return f"{PARTS[found[2]]}.{found[1]}"
    return f"module:{path}" if IN_A_BLOCK.search(path) else None


def hook_of_site(site: str) -> str:
    """The TransformerLens name of a site; one that has none (a module, a block) keeps ours."""
    known = parse_site(site)
    named = known.kind in HOOK_NAMES
    return f"blocks.{known.layer}.{HOOK_NAMES[known.kind]}" if named else site


def module_of_site(site: str, model_name: str) -> str:
    """The Hugging Face module whose output a site is, as sparsify and delphi name it.

    Raises `UserError` for a site that is no module's output.
    """
    known: Site = parse_site(site)
    if known.kind == "module" and known.path is not None and known.tensor == "output":
        return known.path
    gpt2 = "gpt2" in model_name.lower()
    attention = "attn" if gpt2 else "self_attn"
    parts = {"resid_post": "", "mlp_out": ".mlp", "attn_out": f".{attention}"}
    if known.kind not in parts:
        raise UserError(
            f"site {site} is no output of a Hugging Face module, which is what this format names; "
            "give the name yourself with --name."
        )
    return f"{'h' if gpt2 else 'layers'}.{known.layer}{parts[known.kind]}"
