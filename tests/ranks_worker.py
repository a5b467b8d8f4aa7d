"""What each of several processes does for `test_ranks`; never collected."""

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, install_import_hook
from torch import Tensor

from app.cli import dispatch

CHECKED = ("probe.ranks", "probe.store_writing", "saes.replicas", "saes.sharded", "saes.training")
with install_import_hook(CHECKED, "beartype.beartype"):
    from probe.corpora import token_batches
    from probe.loader import StreamSource
    from probe.ranks import Ranks, create_run, joined
    from probe.runs import Run
    from probe.sites import parse_site
    from probe.store_writing import write_store
    from probe.toy import tiny_llama
    from saes.activations import (
        BatchTopK,
        Gated,
        JumpRelu,
        KSparse,
        Matryoshka,
        Relu,
        TopAfa,
        TopK,
    )
    from saes.replicas import Replicas, strongest_of_all
    from saes.sharded import Shards
    from saes.training import Job, TrainConfig, fit
    from saes.types import Chosen

SITE = "resid_post.0"
CASES: dict[str, dict] = {
    "topk": {"activation": TopK(k=4)},
    "multi": {"activation": TopK(k=4, multi=True), "normalize": "none"},
    "batch_topk": {"activation": BatchTopK(k=4)},
    "matryoshka": {"activation": Matryoshka(k=4, prefixes=(8, 24))},
    "top_afa": {"activation": TopAfa()},
    "jump_relu": {"activation": JumpRelu(l0=0.01, start=0.5)},
    "gated": {"activation": Gated(l1=0.05)},
    "relu": {"activation": Relu(l1=0.05)},
    "k_sparse": {"activation": KSparse(k=4, k_start=8)},
    "few_touched": {"activation": TopK(k=3), "d_sae": 2048, "steps": 6},
}
"""Trained with the rows of each batch divided."""
SHARDED: dict[str, dict] = {
    "sharded": {"activation": TopK(k=4)},
    "sharded_odd": {"activation": TopK(k=3), "d_sae": 75, "normalize": "layer_norm"},
    "sharded_bfloat16": {"activation": TopK(k=4), "encoder_dtype": "bfloat16"},
    "sharded_large": {"activation": TopK(k=2), "d_sae": 1537, "steps": 6},
}
"""Trained with the latents divided."""
WIDENED = "top_afa"
"""Begun by one process and finished by two, the rows divided."""
SMALL = ("--context", "16", "--batch-sequences", "4", "--dtype", "float32")
STREAM = (
    "train", "{folder}/tiny", "--corpus", "{folder}/corpus.jsonl", "--site", SITE, "--d-sae", "64",
    "--k", "4", "--steps", "6", "--batch-size", "63", "--buffer-rows", "256", "--init-rows", "200",
    *SMALL, "--root", "{folder}/pair",
)  # fmt: skip
COMMANDS = (STREAM, (*STREAM, "--seed", "1", "--shard-latents"))
"""Commands that leave the same folders from one process and from two."""


class Rows:
    """Sparse mixtures of 40 directions in 16 dimensions, off centre; batch `i` has seed `i`."""

    d = 16
    n_rows = None

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def batch(self, seed: int, n: int) -> Float[Tensor, "b d"]:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(40, self.d, generator=torch.Generator().manual_seed(-1))
        codes = torch.rand(n, 40, generator=generator)
        codes = codes * (torch.rand(n, 40, generator=generator) < 0.05)
        return 5 * (codes @ directions + 1)

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        return self.batch(10**6, n)

    def batches(self, start: int) -> Iterator[Float[Tensor, "b d"]]:
        while True:
            if start == self.stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield self.batch(start, 63)
            start += 1


def make_job(ranks: Ranks, root: Path, name: str) -> Job:
    values = {
        "d_sae": 64, "steps": 24, "lr": 3e-3, "warmup_steps": 5, "k_aux": 8,
        "dead_after_tokens": 63, "init_rows": 500, "log_every": 3, "checkpoint_every": 7,
    }  # fmt: skip
    config = TrainConfig(**(values | (CASES | SHARDED)[name]))
    run = create_run(ranks, root, name, {"kind": "sae", "schema": 1, "train": str(config)})
    return Job(run=run, config=config)


def train_all(ranks: Ranks, folder: Path) -> None:
    """Every case, and one run that is killed: rank 1 dies before its step 18."""
    for division, names in ((Replicas(ranks=ranks), CASES), (Shards(ranks=ranks), SHARDED)):
        jobs = [make_job(ranks, folder, name) for name in names]
        fit(jobs, Rows(), progress=False, division=division)
    save_small_things(ranks, folder)
    killed = make_job(ranks, folder / "killed", "sharded")
    source = Rows(stop_at=17 if ranks.rank == 1 else None)
    fit([killed], source, progress=False, division=Shards(ranks=ranks))


def save_small_things(ranks: Ranks, folder: Path) -> None:
    """Choices with ties, and batches of a stream that is captured together."""
    own = ((3.0, 1.0, 2.0), (2.0, 2.0, 5.0, 2.0))[ranks.rank]
    pool = Chosen(
        values=torch.tensor(own),
        latents=torch.arange(len(own)),
        lengths=torch.tensor([1, len(own) - 1]),
    )
    best = strongest_of_all(pool, 4, ranks)
    # Two rows; the second has fewer positive entries than are kept, and ties across the ranks.
    values = torch.tensor([[[4.0, 1.0], [2.0, 0.0]], [[3.0, 2.0], [2.0, 2.0]]])[ranks.rank]
    chosen = Chosen(
        values=values.flatten(), latents=torch.tensor([5, 3, 1, 0]), lengths=torch.tensor([2, 2])
    )
    won = Shards(ranks=ranks).winners(chosen, 2)
    source = make_stream(folder / "corpus.jsonl", ranks)
    found = {"sample": source.sample(40)}
    found |= {str(i): x for i, x in zip(range(20), source.batches(3), strict=False)}
    for name, part in (("pool", best), ("winners", won)):
        found |= {f"{name}.{key}": getattr(part, key) for key in ("values", "latents", "lengths")}
    torch.save(found, folder / f"small-{ranks.rank}.pt")


def make_stream(corpus: Path, ranks: Ranks) -> StreamSource:
    model = tiny_llama(0)
    read = functools.partial(token_batches, str(corpus), model, context=16, batch_sequences=4)
    return StreamSource(model, parse_site(SITE), read, 16, 0, 64, ranks=ranks)


def resume(ranks: Ranks, folder: Path) -> None:
    """The killed training, that of one process, the commands, and a capture in which rank 1 dies.

    It dies in its second shard: one pass finds the widths, one the norms, three make a shard.
    """
    killed = make_job(ranks, folder / "killed", "sharded")
    fit([killed], Rows(), progress=False, division=Shards(ranks=ranks))
    widened = make_job(ranks, folder / "widened", WIDENED)
    fit([widened], Rows(), progress=False, division=Replicas(ranks=ranks))
    for arguments in COMMANDS:
        assert dispatch([argument.format(folder=folder) for argument in arguments]) == 0
    model, seen = tiny_llama(0), []

    def die(*_: object) -> None:
        seen.append(1)
        if ranks.rank == 1 and len(seen) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.get_submodule("model.layers.0").register_forward_hook(die)
    write_store(Run.open(folder / "store"), model, progress=False, ranks=ranks)


def work(rank: int, port: int, task: str, folder: str) -> None:
    """Do a task as one of two processes, told so as torchrun tells them."""
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with joined() as ranks:
        {"train_all": train_all, "resume": resume}[task](ranks, Path(folder))
