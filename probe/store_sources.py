"""What a store is filled from: a language model that reads a corpus, an image model that draws.

`probe.store_writing` writes both alike; here is what differs: the batches, what else is known of a
row, the documents, and what the manifest says of them.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import torch
from torch import Tensor

from probe.corpora import TokenBatch, corpus_checksum, document_ids, token_batches
from probe.diffusion import DiffusionModel, Generated
from probe.errors import Failure, UserError
from probe.image_prompts import PassBatch, pass_batches, prompts_checksum, read_prompts
from probe.language import LanguageModel
from probe.pictures import Picture, encode
from probe.rows import Batch
from probe.store import open_tensors, rows_path
from probe.store_config import AnyStoreConfig, ImageStoreConfig, StoreConfig

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 1000


class TextSource:
    """A corpus and its reader."""

    unit = "tokens"

    def __init__(self, config: StoreConfig, model: LanguageModel) -> None:
        """See `open_source`."""
        self.config, self.model = config, model

    def units(self, sequences: int) -> int:
        """Tokens of so many sequences."""
        return sequences * self.config.context

    def batches(self, sequence: int) -> Iterator[TokenBatch]:
        """The batches from this sequence on."""
        return token_batches(
            self.config.corpus,
            self.model,
            context=self.config.context,
            batch_sequences=self.config.batch_sequences,
            max_tokens=self.config.tokens,
            start_sequence=sequence,
        )

    def keeper(self, batch: Batch, pictures: list[Picture]) -> None:
        """Text has no pictures to keep."""

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """A token is where its document, sequence and position say, and nowhere else."""
        return {}

    def checksum(self) -> str | None:
        """SHA-256 of the corpus, where it is a file."""
        return corpus_checksum(self.config.corpus)

    def documents(self, n_documents: int) -> dict[str, list[str]]:
        """What is known of each document: its id."""
        return {"id": document_ids(self.config.corpus, n_documents)}

    def summary(self, folder: Path, n_shards: int) -> dict[str, Any]:
        """Rows, tokens and documents, and how many tokens were dropped and why.

        Raises `UserError` where no row is left.
        """
        n_rows = n_tokens = n_sequences = n_special = n_documents = 0
        special = torch.tensor(sorted(self.model.special_ids))
        for number in range(n_shards):
            rows = open_tensors(rows_path(folder, number))
            tokens, sequence_doc = rows.get_tensor("tokens"), rows.get_tensor("sequence_doc")
            n_rows += len(rows.get_tensor("position"))
            n_special += int(torch.isin(tokens[:, 1:], special).sum())
            n_tokens += tokens.numel()
            n_sequences += len(tokens)
            n_documents = max(n_documents, int(sequence_doc.max()) + 1)
        if n_rows == 0:
            raise UserError(
                "no row is left once position 0 and special tokens are dropped; choose a longer "
                f"context than {self.config.context} or another corpus."
            )
        return {
            "n_rows": n_rows,
            "n_tokens": n_tokens,
            "n_documents": n_documents,
            "dropped_position_0": n_sequences,
            "dropped_special_tokens": n_special,
            "dropped_outlier_norms": n_tokens - n_rows - n_sequences - n_special,
        }


class ImageSource:
    """Prompts and what draws them."""

    unit = "images"

    def __init__(self, config: ImageStoreConfig, model: DiffusionModel) -> None:
        """See `open_source`."""
        self.config, self.model = config, model

    def units(self, sequences: int) -> int:
        """Images of so many passes."""
        return sequences // self.config.passes_of_image

    def batches(self, sequence: int) -> Iterator[PassBatch]:
        """The batches from this pass on."""
        return pass_batches(self.config, sequence)

    def keeper(self, batch: Batch, pictures: list[Picture]) -> Callable[[Generated], None] | None:
        """What puts a batch's images among the pictures; None where none of them is kept."""
        assert isinstance(batch, PassBatch)
        wanted = self.config.keep_images
        if wanted is not None and batch.first_image >= wanted:
            return None

        def keep(drawn: Generated) -> None:
            seeds = batch.seeds
            for i, image in enumerate(batch.images.tolist()):
                if wanted is None or image < wanted:
                    pixels = drawn.images[i]
                    kind, data = encode(pixels)
                    pictures.append(
                        Picture(
                            image=image,
                            doc=int(batch.doc[i * self.config.passes_of_image, 0]),
                            seed=seeds[i],
                            prompt=batch.prompts[i],
                            height=pixels.shape[0],
                            width=pixels.shape[1],
                            format=kind,
                            data=data,
                        )
                    )

        return keep

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """Image, step, y, x and, of both rows of guidance, which one: a value a kept place."""
        assert isinstance(batch, PassBatch)
        return batch.columns()

    def checksum(self) -> str | None:
        """SHA-256 of the prompts, where they are a file."""
        return prompts_checksum(self.config.prompts)

    def documents(self, n_documents: int) -> dict[str, list[str]]:
        """What is known of each prompt: its id, and the prompt."""
        read = read_prompts(self.config.prompts, self.config.seed)
        prompts = list(itertools.islice(read, n_documents))
        return {"id": [one.id for one in prompts], "text": [one.text for one in prompts]}

    def summary(self, folder: Path, n_shards: int) -> dict[str, Any]:
        """Rows, images and prompts, what a row is, and how many prompts were cut."""
        n_rows, n_images = 0, 0
        for number in range(n_shards):
            rows = open_tensors(rows_path(folder, number))
            n_rows += len(rows.get_tensor("position"))
            n_images += self.units(len(rows.get_tensor("tokens")))
        truncated = self._truncated(n_images)
        kept = self.config.keep_images
        return {
            "n_rows": n_rows,
            "n_images": n_images,
            "n_documents": n_images,
            "grid": list(self.config.grid),
            "passes_of_step": list(self.config.passes_of_step),
            "truncated_prompts": truncated,
            "kept_images": n_images if kept is None else min(kept, n_images),
        }

    def _truncated(self, n_prompts: int) -> int:
        read = read_prompts(self.config.prompts, self.config.seed)
        prompts = itertools.islice((one.text for one in read), n_prompts)
        cut = 0
        while some := list(itertools.islice(prompts, PROMPTS_AT_ONCE)):
            cut += int(self.model.truncated(some).sum())
        if cut:
            logger.warning(
                "%d of %d prompts are longer than the %d tokens that the model reads: their ends "
                "were left out",
                cut,
                n_prompts,
                self.model.prompt_tokens,
            )
        return cut


Source = TextSource | ImageSource


def open_source(config: AnyStoreConfig, model: LanguageModel | DiffusionModel) -> Source:
    """What the config reads, by the model that it names."""
    if isinstance(config, ImageStoreConfig):
        assert isinstance(model, DiffusionModel), "images are drawn by an image model"
        return ImageSource(config, model)
    assert isinstance(model, LanguageModel), "text is read by a language model"
    return TextSource(config, model)


def documents_table(source: Source, n_documents: int) -> pyarrow.Table:
    """The documents of a store. Raises `Failure` where they are not those that were read."""
    columns: Mapping[str, list[str]] = source.documents(n_documents)
    found = len(columns["id"])
    if found != n_documents:
        raise Failure(
            f"corpus {source.config.corpus!r} has {found} documents and had {n_documents} when it "
            "was read; delete the store and capture again."
        )
    strings = {name: pyarrow.array(column, pyarrow.string()) for name, column in columns.items()}
    return pyarrow.table({"doc": pyarrow.array(range(n_documents), pyarrow.int32())} | strings)
