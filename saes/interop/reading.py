"""From a folder or a file of another project to an SAE that is known to say the same.

`read_peer` looks which format it is, reads it, and holds the SAE against the format's own formula
on made rows (`saes.interop.verifying`): shapes, finite numbers, codes and reconstructions. What
could not be taken over as it was is in the notes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from probe.errors import UserError
from saes.folder import GOLDEN, load_sae, sae_metadata
from saes.interop import (
    dictionary_learning,
    openai,
    sae_lens,
    sdxl_unbox,
    sparsify,
    top_afa,
)
from saes.interop.records import Found, Imported
from saes.interop.tensor_files import plain
from saes.interop.transforms import decoder_norms, normalise_rows, say_norms
from saes.interop.verifying import probe_rows, says_of, verify
from saes.scales import load_scales

OURS = "lorgnette"
FORMATS = {
    "saelens": sae_lens,
    "sparsify": sparsify,
    "sdxl-unbox": sdxl_unbox,
    "top-afa": top_afa,
    "dictionary_learning": dictionary_learning,
    "openai": openai,
}
READABLE = (OURS, *FORMATS)
"""The formats that are read."""
MATCHES: Mapping[str, Callable[[Path], bool]] = {
    name: module.matches for name, module in FORMATS.items()
}
LOOKS = (
    "cfg.json with sae_weights.safetensors (SAELens) or sae.safetensors (sparsify), config.json "
    "with state_dict.pth (sdxl-unbox) or sae.pt (top-AFA), ae.pt (dictionary_learning), or one .pt "
    "file (OpenAI, dictionary_learning)"
)
ELSEWHERE = {
    "params.npz": "the format of Gemma Scope; load it with SAELens 6 (`SAE.from_pretrained`), save "
    "it with `save_model`, and convert that",
    "model.safetensors": "a whole model, not an SAE",
}
DESCRIBED_BESIDE = ("sae_weights.safetensors", "sae.safetensors", "state_dict.pth", "sae.pt")


def sniff(path: Path) -> str:
    """The format of a folder or file. Raises `UserError` where it is none that is read."""
    path = home_of(path)
    if path.is_dir() and sae_lens.matches(path) and (path / GOLDEN).is_file():
        return OURS
    for name, matches in MATCHES.items():
        if matches(path):
            return name
    for file, what in ELSEWHERE.items():
        if path.name == file or (path / file).is_file():
            raise UserError(f"{path} holds {file}: {what}.")
    inside = [str(child) for child in _children(path) if any(m(child) for m in MATCHES.values())]
    if inside:
        raise UserError(f"{path} holds several SAEs; give one of {', '.join(inside[:8])}.")
    raise UserError(f"{path} is no SAE in a format that is read: wanted {LOOKS}.")


def home_of(path: Path) -> Path:
    """The folder that a weights file belongs to where its description lies beside it."""
    if not path.exists():
        raise UserError(f"there is nothing at {path}; give the folder or file of an SAE.")
    described = any((path.parent / name).is_file() for name in ("cfg.json", "config.json"))
    return path.parent if path.name in DESCRIBED_BESIDE and described else path


def read_peer(
    path: Path,
    format: str = "auto",
    *,
    unit_norm: bool = False,
    input_scale: float | None = None,
) -> Imported:
    """The SAE at `path`, once it says what its format says.

    Args:
        path: a folder or a file.
        format: one of `READABLE`, or "auto" to look which it is.
        unit_norm: give decoder rows unit norm, and codes the length of what they add.
        input_scale: the number a SAELens SAE of `expected_average_only_in` multiplies its input by.

    Raises:
        UserError: it is no SAE, of no format that is read, or holds something that has no place
            here (a transcoder, an unknown option).
        Failure: a file is damaged, a number is not finite, or the SAE does not say the same.
    """
    if format not in (*READABLE, "auto"):
        raise UserError(f"{format!r} is no format that is read: wanted {', '.join(READABLE)}.")
    path = home_of(Path(path))
    format = sniff(path) if format == "auto" else format
    if input_scale is not None and format != "saelens":
        raise UserError(f"--input-scale is for SAELens folders, and {path} is of {format}.")
    if format == OURS:
        imported = Imported(
            format=OURS, sae=load_sae(path), metadata=sae_metadata(path), notes=(),
            scales=load_scales(path),
        )  # fmt: skip
    else:
        imported = _imported(path, format, input_scale)
    if not unit_norm:
        return imported
    sae, notes = normalise_rows(imported.sae)
    scales = imported.scales
    return Imported(
        format=format,
        sae=sae,
        metadata=imported.metadata,
        notes=imported.notes + notes,
        scales=None if scales is None else scales.times(decoder_norms(imported.sae.W_dec)),
    )


def _imported(path: Path, format: str, input_scale: float | None) -> Imported:
    found = _found(path, format, input_scale)
    sae = found.sae.requires_grad_(False).eval()
    rows = probe_rows(sae)
    verify(says_of(sae, rows), found.says(rows), f"the SAE in {path}, read as {format},")
    source = {"format": format, "name": path.resolve().name}
    return Imported(
        format=format,
        sae=sae,
        metadata=plain(found.metadata) | {"converted_from": source},
        notes=found.notes + say_norms(sae.W_dec),
        scales=found.scales,
    )


def _found(path: Path, format: str, input_scale: float | None) -> Found:
    if format == "saelens":
        return sae_lens.read(path, input_scale)
    return FORMATS[format].read(path)


def _children(path: Path) -> list[Path]:
    """Folders one or two below, and the .pt files in them."""
    if not path.is_dir():
        return []
    found = [child for child in sorted([*path.glob("*"), *path.glob("*/*")]) if child.is_dir()]
    return found + sorted(path.glob("*.pt"))
