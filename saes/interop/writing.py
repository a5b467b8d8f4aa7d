"""From an SAE to another project's folder, which is read back and held against what was written.

What a format cannot say is handled in one place. SAELens knows topk, jumprelu (BatchTopK and
Matryoshka are saved as it), gated and standard SAEs; sparsify and sdxl-unbox know TopK on raw
activations. Everything else is written as the nearest TopK SAE, with the error that makes
(`saes.interop.freezing`); what cannot be approximated so is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from probe.errors import UserError
from saes.activations import BatchTopK, Matryoshka, TopK
from saes.interop import reading, sae_lens, sdxl_unbox, sparsify
from saes.interop.freezing import freeze
from saes.interop.records import Written, own_words
from saes.interop.tensor_files import fresh_folder
from saes.interop.verifying import probe_rows, says_of, verify
from saes.models import SparseAutoencoder
from saes.scales import FeatureScales

WRITABLE = ("saelens", "sparsify", "sdxl-unbox")
"""The formats of weights that are written."""


def writable_form(
    sae: SparseAutoencoder, format: str, rows: Float[Tensor, "n d"] | None
) -> tuple[Written, dict[str, Any]]:
    """The SAE as a format can hold it, and what its metadata say of an approximation.

    Raises `UserError` where the format has no place for it, or `rows` of real activations are
    needed and missing.
    """
    if format not in WRITABLE:
        raise UserError(f"{format!r} is no format that is written: wanted {', '.join(WRITABLE)}.")
    activation = sae.config.activation
    if format != "saelens" and sae.config.normalize != "none":
        raise UserError(
            f"{format} reads raw activations and this SAE normalises each input by its own mean "
            "and deviation, which no weights can say; write it for SAELens, or train with "
            "--normalize scale."
        )
    fits = isinstance(activation, TopK) or (
        format == "saelens" and sae_lens.architecture_of(activation) is not None
    )
    if not fits:
        frozen = freeze(sae, rows)
        described = {"frozen_from": type(activation).__name__, "frozen": frozen.described()}
        return Written(sae=frozen.sae, notes=frozen.notes), described
    notes: tuple[str, ...] = ()
    if isinstance(activation, BatchTopK | Matryoshka):
        notes += ("written as jumprelu with its threshold, as SAELens saves its own.",)
    if isinstance(activation, TopK) and activation.multi and format == "saelens":
        notes += ("that it was trained with multi-TopK is not said.",)
    return Written(sae=sae, notes=notes), {}


def write_peer(
    sae: SparseAutoencoder,
    folder: Path,
    format: str,
    *,
    metadata: Mapping[str, Any],
    rows: Float[Tensor, "n d"] | None = None,
    scales: FeatureScales | None = None,
    notes: tuple[str, ...] = (),
) -> Written:
    """Write an SAE as another project's folder.

    Args:
        sae: the SAE, on the CPU.
        folder: where to; must not be there yet.
        format: one of `WRITABLE`.
        metadata: where the SAE belongs (`model_name`, `hook_name`, ...), for formats that say so.
        rows: real activations, needed where the format cannot hold the activation exactly.
        scales: for sdxl-unbox, how strongly each feature fires.
        notes: what is known already to be lost; written beside the weights with the rest.

    Raises:
        UserError: the format has no place for the SAE, or the folder is there already.
        Failure: what was written does not say what the SAE says.
    """
    written, described = writable_form(sae, format, rows)
    if format == "sdxl-unbox" and scales is None:
        lost = "mean.pt and std.pt (units of the brush) are not written: no activations were given."
        written = Written(sae=written.sae, notes=(*written.notes, lost))
    everything = (*notes, *written.notes)
    with fresh_folder(folder) as partial:
        said = dict(metadata) | described
        if format == "saelens":
            said |= {"conversion_notes": list(everything)} if everything else {}
            sae_lens.write(written.sae, partial, said)
        elif format == "sparsify":
            sparsify.write(written.sae, partial, own_words(said, everything))
        else:
            sdxl_unbox.write(written.sae, partial, own_words(said, everything), scales)
        read = reading.read_peer(partial, format)
        x = probe_rows(written.sae)
        verify(says_of(read.sae, x), says_of(written.sae, x), f"the {format} folder of the SAE")
    return Written(sae=written.sae, notes=everything)
