"""Several processes that work on one result: who is who, and how they exchange numbers.

`torchrun` starts the processes, tells each its number through the environment (RANK, WORLD_SIZE,
LOCAL_RANK) and stops all of them as soon as one fails. `joined` connects them: tensors on a CPU
travel by gloo, those on a CUDA device by nccl, a device for each process. A process that `torchrun`
did not start is `ALONE`: no group is made and every exchange is nothing at all.

All ranks see the same folders (one machine, or a file system that the machines share). The first
one creates, locks and finishes run folders; the others only put their own files there.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed

from probe.errors import Failure
from probe.runs import CONFIG, Run, config_hash

TIMEOUT = timedelta(days=1)
"""How long a rank waits for another: `torchrun` ends all of them at once where one fails, and a
rank may truly work for hours between two exchanges (a capture, the checksums of a large store)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One of several processes; all of them call the same methods in the same order."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """Number of processes."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def part(self, n: int, rank: int | None = None) -> range:
        """This rank's (or another's) share of `n` things: as many for each, one more or less."""
        rank = self.rank if rank is None else rank
        return range(n * rank // self.size, n * (rank + 1) // self.size)

    def wait(self) -> None:
        """Come back once every rank is here."""
        self.summed(torch.zeros(1))

    def summed(self, tensor: Tensor) -> Tensor:
        """Add up what the ranks hold, in place; every rank then has the same bits."""
        return self._reduced(tensor, distributed.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest of what the ranks hold, entry by entry, in place."""
        return self._reduced(tensor, distributed.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            distributed.all_reduce(tensor, op=how)
        return tensor

    def of_first(self, tensor: Tensor) -> Tensor:
        """What the first rank holds, in place."""
        if self.size > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def gathered(self, tensor: Shaped[Tensor, "*n"]) -> Shaped[Tensor, "r *n"]:
        """What all ranks hold, all of one shape, in the order of the ranks."""
        if self.size == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(found, tensor.contiguous())
        return torch.stack(found)

    def joined_rows(self, rows: Shaped[Tensor, "n *d"]) -> list[Shaped[Tensor, "_ *d"]]:
        """The rows of every rank, however many each has, in the order of the ranks."""
        if self.size == 1:
            return [rows]
        lengths = self.gathered(torch.tensor(len(rows))).tolist()
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = self.gathered(padded)
        return [part[:length] for part, length in zip(found, lengths, strict=True)]

    def all_say(self, yes: bool) -> bool:
        """Whether every rank says yes."""
        return not int(self.largest(torch.tensor(0 if yes else 1)))

    def first_says(self, yes: bool) -> bool:
        """What the first rank says."""
        return bool(self.of_first(torch.tensor(int(yes))))

    def lock(self, run: Run) -> contextlib.AbstractContextManager[None]:
        """The run's lock, which the first rank holds for all."""
        return run.lock() if self.is_first else contextlib.nullcontext()


ALONE = Ranks()
"""The one process there is where `torchrun` is not used."""


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started with this one, until the block is left.

    A group that is there already is used, and stays.
    """
    if distributed.is_initialized():
        yield Ranks(rank=distributed.get_rank(), size=distributed.get_world_size())
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(rank=distributed.get_rank(), size=distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def create_run(ranks: Ranks, parent: Path, name: str, config: dict[str, Any]) -> Run:
    """`Run.create` by the first rank; the others open what it made.

    Raises `Failure` where another rank does not see it, and as `Run.create` does.
    """
    run = Run.create(parent, name, config) if ranks.is_first else None
    ranks.wait()
    if run is None:
        path = Path(parent) / f"{name}-{config_hash(config)}"
        if not (path / CONFIG).is_file():
            raise Failure(
                f"rank {ranks.rank} does not see the folder {path} that rank 0 was to make; give "
                "--root a folder that all machines share, and run the same versions on alike ones."
            )
        run = Run.create(parent, name, config)
    ranks.wait()
    return run
