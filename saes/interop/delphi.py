"""The latent cache of delphi (github.com/EleutherAI/delphi), from a store and an SAE.

    <cache>/<hookpoint>/config.json               what was read, and the model for its tokenizer
    <cache>/<hookpoint>/<start>_<end>.safetensors    latents start to end (both counted in)
        locations    [n, 3] uint16 or uint32      sequence, position, latent minus start
        activations  [n] float16
        tokens       [sequences, context] int64   the same in every file

Entries come sequence by sequence, position by position, latent by latent; activations of 1e-5 or
less are left out, and float16 ends at 65504, as in delphi's own `LatentCache`. The borders of the
ranges are its own too: whole parts of an even division.

The store is encoded once, a few rows at a time; entries go to one pair of temporary files a range,
which are then joined behind a safetensors header. Memory does not depend on the store's size.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from probe.errors import UserError
from probe.runs import atomic_path, write_json
from probe.store import ActivationStore, Shard
from saes.interop.tensor_files import fresh_folder
from saes.models import SparseAutoencoder
from saes.types import Codes

LEAST = 1e-5
"""delphi keeps activations above this."""
LARGEST = float(np.finfo(np.float16).max)
ROWS_AT_ONCE = 2048
DTYPES = {"F16": np.float16, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}
"""safetensors's names of number formats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """The firings of some rows, by sequence, position and latent."""

    sequence: np.ndarray
    """Number of each one's sequence in the store."""
    position: np.ndarray
    """Its position in the sequence."""
    latent: np.ndarray
    """Its latent."""
    value: np.ndarray
    """Its activation, float32."""


def write_cache(
    sae: SparseAutoencoder,
    store: ActivationStore,
    site: str,
    cache: Path,
    *,
    hookpoint: str,
    model_name: str,
    n_splits: int = 5,
    progress: bool = True,
) -> tuple[str, ...]:
    """Write `cache/hookpoint`; gives what the cache does not hold, a sentence each.

    Args:
        sae: encodes the rows, on the device its weights are on.
        store: the activations, `site` the site of them that the SAE reads.
        cache: the cache's folder; other hookpoints in it are left alone.
        hookpoint: the module's name in the Hugging Face base model.
        model_name: a Hugging Face id or folder that delphi can load the tokenizer of.
        n_splits: files, each with a range of latents.
        progress: show a bar on stderr.

    Raises:
        UserError: widths differ, there are more files than latents, or the folder is there already.
        Failure: an activation is not finite.
    """
    _check(sae, store, site, n_splits)
    if Path(hookpoint).name != hookpoint:
        raise UserError(f"a hookpoint is the name of one folder, without slashes: {hookpoint!r}.")
    borders = torch.linspace(0, sae.config.d_sae, steps=n_splits + 1).long().numpy()
    n_sequences: int = store.run.manifest["summary"]["n_sequences"]
    kind = "U16" if max(n_sequences, int(np.diff(borders).max())) <= 2**16 else "U32"
    with fresh_folder(cache / hookpoint) as folder:
        with contextlib.ExitStack() as held:
            spools = [_open_spools(held, folder, i) for i in range(n_splits)]
            tokens = held.enter_context((folder / "tokens.part").open("w+b"))
            counts, clipped = _spool(sae, store, site, borders, kind, spools, tokens, progress)
            shape = [n_sequences, store.config.context]
            for start, end, pair, n in zip(borders, borders[1:], spools, counts, strict=False):
                parts = [
                    ("tokens", "I64", shape, tokens),
                    ("locations", kind, [n, 3], pair[0]),
                    ("activations", "F16", [n], pair[1]),
                ]
                join_safetensors(folder / f"{start}_{end - 1}.safetensors", parts)
        for part in folder.glob("*.part"):
            part.unlink()
        write_json(folder / "config.json", _config(store, n_splits, model_name))
    clipping = f"{clipped} activations above 65504 were cut to it: float16 ends there."
    return losses(store) + ((clipping,) if clipped else ())


def losses(store: ActivationStore) -> tuple[str, ...]:
    """What a cache of a store does not hold, a sentence each."""
    notes = (
        "activations are float16 and those of 1e-5 or less are left out, as in delphi's own cache.",
    )
    dropped = store.run.manifest["summary"]["n_sequences"] * store.config.context - store.n_rows
    if dropped:
        notes += (
            f"on the {dropped} tokens that {store.run.path.name} dropped (position 0, special "
            "tokens, outlier norms) every latent counts as silent.",
        )
    return notes


def entries_of(codes: Codes, shard: Shard, rows: slice) -> Entries:
    """The firings of some rows of a shard, in delphi's order."""
    values = codes.values.float().cpu().numpy()
    latents = codes.indices.cpu().numpy()
    row, column = np.nonzero(np.abs(values) > LEAST)
    latent = latents[row, column]
    order = np.lexsort((latent, row))
    row, column = row[order], column[order]
    return Entries(
        sequence=shard.sequence.numpy()[rows][row],
        position=shard.position.numpy()[rows][row],
        latent=latent[order],
        value=values[row, column],
    )


def join_safetensors(path: Path, parts: Sequence[tuple[str, str, Sequence[int], BinaryIO]]) -> None:
    """Write tensors (name, number format, shape, file of their bytes) as one safetensors file.

    The bytes are copied, never held: a header of JSON with each tensor's place, then the tensors.
    """
    header, place = {}, 0
    for name, kind, shape, _ in parts:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[kind]).itemsize
        offsets = [place, place + size]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": offsets}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, source in parts:
            source.seek(0)
            shutil.copyfileobj(source, file, 2**20)


def _spool(
    sae: SparseAutoencoder,
    store: ActivationStore,
    site: str,
    borders: np.ndarray,
    kind: str,
    spools: Sequence[tuple[BinaryIO, BinaryIO]],
    tokens: BinaryIO,
    progress: bool,
) -> tuple[list[int], int]:
    """Encode the store into the files of the ranges; entries of each, and how many were cut."""
    counts, clipped = [0] * len(spools), 0
    with tqdm(total=store.n_rows, desc="encode", unit=" rows", disable=not progress) as bar:
        for number in range(store.n_shards):
            shard = store.shard(number, site)
            tokens.write(shard.tokens.long().numpy().tobytes())
            for first in range(0, len(shard.values), ROWS_AT_ONCE):
                rows = slice(first, first + ROWS_AT_ONCE)
                x = shard.values[rows].to(sae.W_dec.device, torch.float32)
                with torch.inference_mode():
                    found = entries_of(sae.encode(x), shard, rows)
                clipped += int((np.abs(found.value) > LARGEST).sum())
                for i, n in enumerate(_append(found, borders, kind, spools)):
                    counts[i] += n
                bar.update(len(x))
    return counts, clipped


def _append(
    found: Entries, borders: np.ndarray, kind: str, spools: Sequence[tuple[BinaryIO, BinaryIO]]
) -> list[int]:
    """Write each range's entries behind those it has; gives how many they are."""
    of_range = np.searchsorted(borders, found.latent, side="right") - 1
    counts = []
    for i, (locations, activations) in enumerate(spools):
        mine = of_range == i
        places = np.stack(
            [found.sequence[mine], found.position[mine], found.latent[mine] - borders[i]], axis=1
        )
        locations.write(places.astype(DTYPES[kind]).tobytes())
        values = np.clip(found.value[mine], -LARGEST, LARGEST).astype(np.float16)
        activations.write(values.tobytes())
        counts.append(len(values))
    return counts


def _open_spools(
    held: contextlib.ExitStack, folder: Path, number: int
) -> tuple[BinaryIO, BinaryIO]:
    paths = (folder / f"{name}-{number}.part" for name in ("locations", "activations"))
    locations, activations = (held.enter_context(path.open("w+b")) for path in paths)
    return locations, activations


def _config(store: ActivationStore, n_splits: int, model_name: str) -> dict[str, Any]:
    """delphi's `CacheConfig` and the model, under the keys of its older and newer versions."""
    n_sequences = store.run.manifest["summary"]["n_sequences"]
    context = store.config.context
    return {
        "dataset_repo": store.config.corpus,
        "dataset_split": "train",
        "dataset_name": "",
        "dataset_column": "text",
        "dataset_row": "text",
        "batch_size": store.config.batch_sequences,
        "cache_ctx_len": context,
        "ctx_len": context,
        "n_tokens": n_sequences * context,
        "n_splits": n_splits,
        "model_name": model_name,
    }


def _check(sae: SparseAutoencoder, store: ActivationStore, site: str, n_splits: int) -> None:
    if store.d(site) != sae.config.d_in:
        raise UserError(
            f"the SAE reads activations of width {sae.config.d_in} and site {site} of "
            f"{store.run.path} has width {store.d(site)}; give the site it was trained on."
        )
    if not 1 <= n_splits <= sae.config.d_sae:
        raise UserError(
            f"--splits must be from 1 to the number of latents, {sae.config.d_sae}; got {n_splits}."
        )
