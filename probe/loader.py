"""Shuffled batches of activations for training, from a store or straight from a model.

The first two sources cut an endless stream of rows into buffers of a whole number of batches and
shuffle the rows inside each buffer. They differ in the stream:

- `StoreReader`: every epoch is a fresh permutation of blocks of `BLOCK_ROWS` neighbouring rows over
  the whole store. A block is about half a sequence, so a buffer mixes `buffer_rows / BLOCK_ROWS`
  places of the corpus while the disk still reads runs of rows, in order, and never a single row.
- `StreamSource`: the corpus in its own order, captured as it goes, again from its start at its end.

`TensorSource` shuffles rows that are in memory already.

Everything is a function of the seed and the batch's number. `batches(start)` therefore jumps to any
batch exactly: the store reader reads the one buffer the batch is in, the stream counts the rows
before it from the tokens alone, without running the model.

Where several ranks (`probe.ranks`) divide the rows of every batch, the store reader reads those of
its rank alone. The stream lets each rank capture every so many-th of the token batches and gives
all rows to all.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.capture import site_widths
from probe.diffusion import DiffusionModel
from probe.errors import UserError
from probe.language import LanguageModel
from probe.ranks import ALONE, Ranks
from probe.rows import Batch, capture_rows, norm_limits, row_norms
from probe.sites import Site
from probe.store import ActivationStore

BLOCK_ROWS = 64
BUFFER_ROWS = 2**17

EPOCH, SHUFFLE, SAMPLE = range(3)
"""What a random number is for; part of its seed, so that no two uses share a stream."""


@runtime_checkable
class ActivationSource(Protocol):
    """Where an SAE's training data come from."""

    @property
    def d(self) -> int:
        """Width of a row."""
        ...

    @property
    def n_rows(self) -> int | None:
        """Rows in one pass over the data; None where that is not known."""
        ...

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        """Some rows in float32, always the same ones, spread over the data, in random order."""
        ...

    def batches(self, start: int) -> Iterator[Float[Tensor, "b d"]]:
        """Endless float32 batches from batch number `start` on."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """A source that can give one rank's rows without reading the others'."""

    def own_batches(self, start: int, ranks: Ranks) -> Iterator[Float[Tensor, "n d"]]:
        """What `batches` gives, of each batch this rank's stretch of the rows."""
        ...


class StoreReader:
    """Shuffled batches of one site of a store, in bounded memory.

    An epoch visits each row at most once and all but the rows that do not fill a batch; which ones
    are left over changes from epoch to epoch. Memory: two buffers in the store's dtype, one being
    used while the next is read by a background thread.
    """

    def __init__(
        self,
        store: ActivationStore,
        site: Site | str,
        batch_size: int,
        seed: int = 0,
        buffer_rows: int = BUFFER_ROWS,
        stop_row: int | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            store: the store.
            site: one of its sites.
            batch_size: rows in a batch.
            seed: decides the order.
            buffer_rows: rows mixed at a time; rounded to whole batches, at least one.
            stop_row: read only the rows before this one; None for all of them.

        Raises:
            UserError: the store has no such site or fewer rows than one batch, or a size is 0.
        """
        self._buffer_batches = _buffer_batches(batch_size, buffer_rows)
        self._n_rows = store.n_rows if stop_row is None else min(stop_row, store.n_rows)
        if self._n_rows < batch_size:
            raise UserError(
                f"{store.run.path} has {self._n_rows} rows to read, fewer than one batch of "
                f"{batch_size}; capture more tokens or choose a smaller batch."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = self._n_rows // batch_size
        self._first_rows = np.asarray(store.first_rows)
        self._dtype = store.dtype
        self._d = store.d(site)
        self._shards = [_as_bits(store.values(i, site)) for i in range(store.n_shards)]

    @property
    def d(self) -> int:
        """Width of a row."""
        return self._d

    @property
    def n_rows(self) -> int:
        """Rows in one pass over the data."""
        return self._n_rows

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        """`n` different rows, one from each n-th of the store; all of them where it has fewer."""
        n = min(n, self.n_rows)
        generator = _generator(self.seed, SAMPLE)
        edges = np.arange(n + 1) * self.n_rows // max(n, 1)
        rows = generator.integers(edges[:-1], edges[1:])
        order = torch.from_numpy(generator.permutation(n))
        return self._gather(rows, self._make_buffer(n)).index_select(0, order).float()

    def batches(self, start: int) -> Iterator[Float[Tensor, "b d"]]:
        """Endless float32 batches, epoch after epoch, from batch number `start` on."""
        return self.own_batches(start, ALONE)

    def own_batches(self, start: int, ranks: Ranks) -> Iterator[Float[Tensor, "n d"]]:
        """The same, of each batch this rank's stretch of the rows; the others are not read."""
        epoch, batch = divmod(start, self.batches_per_epoch)
        number, skip = divmod(batch, self._buffer_batches)
        with ThreadPoolExecutor(1, thread_name_prefix="activations") as pool:
            places = self._numbered_buffers(epoch, number)
            part = ranks.part(self.batch_size)
            size = min(self._buffer_batches * len(part), self.n_rows)
            memory = itertools.cycle([self._make_buffer(size), self._make_buffer(size)])
            following = pool.submit(self._load, *next(places), next(memory), part)
            while True:
                current = following
                following = pool.submit(self._load, *next(places), next(memory), part)
                values, order = current.result()
                for rows in order.split(len(part))[skip:]:
                    yield values.index_select(0, rows).float()
                skip = 0

    def _numbered_buffers(self, epoch: int, number: int) -> Iterator[tuple[int, int]]:
        per_epoch = -(-self.batches_per_epoch // self._buffer_batches)
        for later in itertools.count(epoch):
            yield from ((later, i) for i in range(number, per_epoch))
            number = 0

    def _make_buffer(self, n: int) -> Float[Tensor, "n d"]:
        return torch.empty(n, self._d, dtype=self._dtype)

    def _load(self, epoch: int, number: int, buffer: Tensor, part: range) -> tuple[Tensor, Tensor]:
        """One buffer's rows in the order of the disk, and the order to give them out in.

        Of each whole batch those in `part` alone; rows that fill no batch are left out.
        """
        size = self._buffer_batches * self.batch_size
        rows = self._epoch_rows(epoch, number * size, (number + 1) * size)
        order = _generator(self.seed, SHUFFLE, epoch, number).permutation(len(rows))
        whole = order[: len(order) // self.batch_size * self.batch_size]
        own = whole.reshape(-1, self.batch_size)[:, part.start : part.stop].reshape(-1)
        if len(own) < len(rows):
            wanted = np.sort(own)
            rows, own = rows[wanted], np.searchsorted(wanted, own)
        return self._gather(rows, buffer), torch.from_numpy(own)

    def _epoch_rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Rows number `start` to `stop` of an epoch's order, sorted for the disk."""
        n_blocks = -(-self.n_rows // BLOCK_ROWS)
        blocks = _generator(self.seed, EPOCH, epoch).permutation(n_blocks)
        lengths = np.minimum(BLOCK_ROWS, self.n_rows - blocks * BLOCK_ROWS)
        ends = np.cumsum(lengths)
        first, last = np.searchsorted(ends, [start, min(stop, self.n_rows) - 1], side="right")
        chosen, sizes = blocks[first : last + 1], lengths[first : last + 1]
        before = np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.repeat(chosen * BLOCK_ROWS, sizes) + np.arange(sizes.sum()) - before
        skipped = start - (ends[first] - lengths[first])
        return np.sort(rows[skipped : skipped + stop - start])

    def _gather(self, rows: np.ndarray, buffer: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
        """Rows by sorted number, copied to the start of `buffer`; gives that part of it."""
        bits = _as_bits(buffer)
        cuts = np.searchsorted(rows, self._first_rows)
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            if start < stop:
                local = rows[start:stop] - self._first_rows[i]
                # numpy copies on this thread alone and without the GIL; mode="clip" (every row is
                # in range) spares it a temporary copy of the result.
                np.take(self._shards[i], local, axis=0, out=bits[start:stop], mode="clip")
        return buffer[: len(rows)]


class StreamSource:
    """Shuffled batches captured from a model as it reads a corpus: no store, no disk.

    The mixing reaches as far as one buffer; rows of a batch come from about `buffer_rows / context`
    neighbouring sequences. Memory: one buffer in float32. A row of outlier norm, which a store
    would leave out, gives its place to the usual row before it: rows stay countable from tokens
    alone.

    Several sites are captured in one pass; a row is then theirs side by side, and `at` gives one
    site's part, the same numbers as a stream of that site alone.
    """

    def __init__(
        self,
        model: LanguageModel | DiffusionModel,
        sites: Site | Sequence[Site],
        read_tokens: Callable[[], Iterable[Batch]],
        batch_size: int,
        seed: int = 0,
        buffer_rows: int = BUFFER_ROWS,
        max_norm: float = 10.0,
        ranks: Ranks = ALONE,
    ) -> None:
        """Prepare to capture.

        Args:
            model: the model.
            sites: where to read it.
            read_tokens: gives the corpus's token batches from its start, the same ones each time
                (`functools.partial(token_batches, corpus, model, ...)`), or an image model's
                passes (`functools.partial(pass_batches, config)`).
            batch_size: rows in a batch.
            seed: decides the order within a buffer.
            buffer_rows: rows mixed at a time; rounded to whole batches, at least one.
            max_norm: replace rows of a norm above so many medians of the first batch; 0 for none.
            ranks: the processes that share the captures; all of them read as one, in step.
        """
        self.model = model
        self.sites = (sites,) if isinstance(sites, Site) else tuple(sites)
        self.batch_size = batch_size
        self.seed = seed
        self._read_tokens = read_tokens
        self._size = _buffer_batches(batch_size, buffer_rows) * batch_size
        self._widths = list(site_widths(model, self.sites).values())
        self._d = sum(self._widths)
        self._max_norm = max_norm
        self._ranks = ranks
        self._sampled: Tensor | None = None
        self._stream: Iterator[Tensor] | None = None
        self._batch: Tensor | None = None
        self._number = -2  # no batch, nor the one before the first

    @functools.cached_property
    def _limits(self) -> dict[Site, float]:
        """The largest usual norm of each site."""
        first = next(iter(self._read_tokens()))
        rows = capture_rows(self.model, first, self.sites, torch.float32)
        return norm_limits(rows, self._max_norm)

    def at(self, site: Site) -> "SiteOfStream":
        """One site's part of this stream."""
        place = self.sites.index(site)
        start = sum(self._widths[:place])
        return SiteOfStream(self, slice(start, start + self._widths[place]))

    @property
    def d(self) -> int:
        """Width of a row."""
        return self._d

    @property
    def n_rows(self) -> None:
        """Not known before the corpus has been read."""
        return None

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        """Rows from the corpus's beginning: of the first `max(n, buffer)` rows, `n` at random.

        The newest sample is kept, for the parts of this stream.
        """
        if self._sampled is None or len(self._sampled) != n:
            rows = next(self._buffers(0, max(n, self._size)))
            order = _generator(self.seed, SAMPLE).permutation(len(rows))[:n]
            self._sampled = rows.index_select(0, torch.from_numpy(order))
        return self._sampled

    def batch(self, number: int) -> Float[Tensor, "b d"]:
        """Batch number `number`; asked for the same one again, or for the next, it goes on."""
        if number != self._number:
            if number != self._number + 1 or self._stream is None:
                self._stream = self.batches(number)
            self._batch, self._number = next(self._stream), number
        assert self._batch is not None
        return self._batch

    def batches(self, start: int) -> Iterator[Float[Tensor, "b d"]]:
        """Endless float32 batches from batch number `start` on.

        Raises `UserError` where the corpus has fewer rows than one batch, and `Failure` where an
        activation is not finite.
        """
        number, skip = divmod(start, self._size // self.batch_size)
        for rows in self._buffers(number * self._size, self._size):
            order = _generator(self.seed, SHUFFLE, number).permutation(self._size)
            for batch in torch.from_numpy(order).split(self.batch_size)[skip:]:
                yield rows.index_select(0, batch)
            number, skip = number + 1, 0

    def _buffers(self, first_row: int, size: int) -> Iterator[Float[Tensor, "n d"]]:
        """The endless rows from `first_row` on, `size` at a time, in the same memory every time."""
        buffer = torch.empty(size, self._d)
        filled = 0
        for rows in self._rows(first_row):
            while len(rows):
                taken = rows[: size - filled]
                buffer[filled : filled + len(taken)] = taken
                filled, rows = filled + len(taken), rows[len(taken) :]
                if filled == size:
                    yield buffer
                    filled = 0

    def _capture(self, batch: Batch) -> Float[Tensor, "n d"]:
        rows = capture_rows(self.model, batch, self.sites, torch.float32)
        usual = [repeat_usual(rows[site].cpu(), self._limits[site]) for site in self.sites]
        return torch.cat(usual, dim=1)

    def _captured(self, waiting: list[tuple[Batch, int]]) -> Iterator[Float[Tensor, "n d"]]:
        """The rows of at most as many token batches as there are ranks, less the skipped ones."""
        if not waiting:
            return
        own = self._ranks.rank
        rows = self._capture(waiting[own][0]) if own < len(waiting) else torch.empty(0, self._d)
        parts = self._ranks.joined_rows(rows)
        yield from (part[skip:] for part, (_, skip) in zip(parts, waiting, strict=False))

    def _rows(self, skip: int) -> Iterator[Float[Tensor, "n d"]]:
        """The endless rows in the corpus's order, without the first `skip`, a batch at a time."""
        while True:
            n_rows = 0
            waiting: list[tuple[Batch, int]] = []
            for batch in self._read_tokens():
                kept = int(batch.keep.sum())
                n_rows += kept
                if skip < kept:
                    waiting.append((batch, skip))
                skip = max(0, skip - kept)
                if len(waiting) == self._ranks.size:
                    yield from self._captured(waiting)
                    waiting = []
            yield from self._captured(waiting)
            if n_rows < self.batch_size:
                raise UserError(
                    f"the corpus has {n_rows} rows, fewer than one batch of {self.batch_size}; "
                    "give more text or choose a smaller batch."
                )
            skip %= n_rows


class SiteOfStream:
    """One site of a stream of several.

    Parts of one stream that are read in step share every batch: it is captured once.
    """

    def __init__(self, stream: StreamSource, columns: slice) -> None:
        """See `StreamSource.at`."""
        self.stream = stream
        self.columns = columns

    @property
    def d(self) -> int:
        """Width of a row."""
        return self.columns.stop - self.columns.start

    @property
    def n_rows(self) -> None:
        """Not known before the corpus has been read."""
        return None

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        """As the stream's."""
        return self.stream.sample(n)[:, self.columns].contiguous()

    def batches(self, start: int) -> Iterator[Float[Tensor, "b d"]]:
        """As the stream's."""
        for number in itertools.count(start):
            yield self.stream.batch(number)[:, self.columns].contiguous()


class TensorSource:
    """Shuffled batches of rows in memory; every epoch is a fresh permutation of all of them."""

    def __init__(self, x: Float[Tensor, "n d"], batch_size: int, seed: int = 0) -> None:
        """Prepare to read. Raises `UserError` where there are fewer rows than one batch."""
        if not 1 <= batch_size <= len(x):
            raise UserError(
                f"the batch size must be from 1 to the number of rows, {len(x)}; got {batch_size}."
            )
        self.x = x
        self.batch_size = batch_size
        self.seed = seed

    @property
    def d(self) -> int:
        """Width of a row."""
        return self.x.shape[1]

    @property
    def n_rows(self) -> int:
        """Rows in one pass over the data."""
        return len(self.x)

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        """`n` different rows at random, all where there are fewer."""
        order = _generator(self.seed, SAMPLE).permutation(len(self.x))[:n]
        return self.x.index_select(0, torch.from_numpy(order)).float()

    def batches(self, start: int) -> Iterator[Float[Tensor, "b d"]]:
        """Endless float32 batches, epoch after epoch, from batch number `start` on."""
        epoch, skip = divmod(start, len(self.x) // self.batch_size)
        while True:
            order = torch.from_numpy(_generator(self.seed, EPOCH, epoch).permutation(len(self.x)))
            for batch in order.split(self.batch_size)[skip:]:
                if len(batch) == self.batch_size:
                    yield self.x.index_select(0, batch).float()
            epoch, skip = epoch + 1, 0


def repeat_usual(rows: Float[Tensor, "n d"], limit: float) -> Float[Tensor, "n d"]:
    """The rows, each one of a norm above `limit` replaced by the last usual one before it.

    Those before the first usual row are replaced by that one; where none is usual, nothing is done.
    """
    usual = row_norms(rows) <= limit
    if usual.all() or not usual.any():
        return rows
    first = int(usual.nonzero()[0])
    place = torch.where(usual, torch.arange(len(rows)), first).cummax(0).values
    return rows[place]


def _buffer_batches(batch_size: int, buffer_rows: int) -> int:
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}.")
    return max(1, buffer_rows // batch_size)


def _generator(seed: int, *use: int) -> np.random.Generator:
    return np.random.default_rng([seed, *use])


def _as_bits(values: Float[Tensor, "n d"]) -> Int[np.ndarray, "n d"]:
    """The same memory as a numpy array of integers, since numpy has no bfloat16."""
    whole = {2: torch.int16, 4: torch.int32}[values.element_size()]
    return values.view(whole).numpy()
