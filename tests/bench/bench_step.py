"""One training step: sparse kernels beside plain dense autograd, and every part beside its floor.

A part's floor is what the machine could not do it faster than: its floating-point operations at the
rate of a large matrix product, or the bytes it must move at the rate of a large copy, whichever
takes longer. Both rates are measured first. The floor of the step is the sum of the floors; the
dense encoder product is most of it.

The plain step runs as plain code does, and once more with `saes.memory`'s setting, from which it
gains too: most of its time beyond the products goes into memory that the system hands out anew.

`python -m tests.bench.bench_step` prints the tables.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch.nn import functional

from saes import kernels, selection
from saes.activations import TopK
from saes.constraints import normalise_decoder, project_decoder_gradient
from saes.memory import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory
from saes.reduced import ReducedEncoder
from saes.training import TrainConfig, fresh_state, train_step
from saes.types import Chosen
from tests.bench.timing import side_by_side

D_IN, BATCH, K = 576, 4096, 32
SIZES = (4608, 18432)
LIVE_SHARE = 0.75
"""Share of the latents that fire where some are dead."""
DEAD_SIZE = 0.25
ROUNDS = 5
ENCODERS = {"sparse kernels": "float32", "sparse kernels, bfloat16 encoder": "bfloat16"}
M_MMAP_THRESHOLD = -3
"""A name of glibc's `mallopt`."""


def measure() -> pd.DataFrame:
    """Tokens a second of a step, for two sizes of dictionary, without dead latents and with."""
    tables = []
    for d_sae in SIZES:
        for dead in (False, True):
            x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
            plain = dense_step(d_sae, dead, x)
            ways = {
                "dense autograd": in_memory(default_memory, plain),
                "the same, freed memory kept": in_memory(keep_freed_memory, plain),
            }
            for name, encoder in ENCODERS.items():
                step = sparse_step(d_sae, dead, x, encoder)
                ways[name] = in_memory(keep_freed_memory, step)
            table = side_by_side(ways, BATCH, "tokens", ROUNDS, settle=True)
            table.insert(0, "latents", d_sae)
            table.insert(1, "dead", f"{1 - LIVE_SHARE:.0%}" if dead else "none")
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def in_memory(prepare: Callable[[], object], step: Callable[[], object]) -> Callable[[], None]:
    """A step before which the C library is told what to do with freed memory."""

    def prepared() -> None:
        prepare()
        step()

    return prepared


def default_memory() -> None:
    """Give memory back to the system as glibc does by itself once it has seen large arrays."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for name, value in (
            (M_MMAP_MAX, 2**16),
            (M_MMAP_THRESHOLD, 2**25),
            (M_TRIM_THRESHOLD, 2**26),
        ):
            mallopt(name, value)


def dead_latents(d_sae: int) -> torch.Tensor:
    """The numbers of the latents that never fire where some are dead: the last ones.

    Their encoder rows are `DEAD_SIZE` times as long: half of their pre-activations are positive, so
    that AuxK has all it can use, and none is among a row's largest.
    """
    return torch.arange(round(LIVE_SHARE * d_sae), d_sae)


def sparse_step(d_sae: int, dead: bool, x: torch.Tensor, encoder: str) -> Callable[[], object]:
    """The project's own step. Dead latents are kept dead, so that every round does the same."""
    config = TrainConfig(
        d_sae=d_sae,
        activation=TopK(k=K),
        steps=10**6,
        normalize="none",
        dead_after_tokens=10**12,
        encoder_dtype="bfloat16" if encoder == "bfloat16" else "float32",
    )
    state = fresh_state(config, x, "cpu")
    numbers = dead_latents(d_sae)
    if dead:
        with torch.no_grad():
            state.sae.W_enc[:, numbers] *= DEAD_SIZE

    def step() -> None:
        if dead:
            state.silent_tokens[numbers] = 10**12
        train_step(state, x, config)

    return step


def dense_step(d_sae: int, dead: bool, x: torch.Tensor) -> Callable[[], None]:
    """TopK and AuxK written down plainly: dense codes, dense products, autograd, fused Adam."""
    config = TrainConfig()
    generator = torch.Generator().manual_seed(0)
    W_dec = functional.normalize(torch.randn(d_sae, D_IN, generator=generator), dim=1)
    W_enc = W_dec.T.clone()
    numbers = dead_latents(d_sae)
    if dead:
        W_enc[:, numbers] *= DEAD_SIZE
    W_enc.requires_grad_()
    W_dec.requires_grad_()
    b_enc = torch.zeros(d_sae, requires_grad=True)
    b_dec = torch.zeros(D_IN, requires_grad=True)
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-3, fused=True)
    variance = float((x - x.mean(0)).square().sum(1).mean())
    silent = torch.zeros(d_sae, dtype=torch.long)

    def top(pre: torch.Tensor, k: int) -> torch.Tensor:
        values, indices = pre.topk(k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    def step() -> None:
        pre = (x - b_dec) @ W_enc + b_enc
        codes = top(pre, K)
        error = x - (codes @ W_dec + b_dec)
        loss = error.square().sum(1).mean() / variance
        if dead:
            alive = torch.ones(d_sae, dtype=torch.bool)
            alive[numbers] = False
            guess = top(pre.masked_fill(alive, -torch.inf), config.k_aux) @ W_dec
            left = error.detach()
            loss = loss + (guess - left).square().mean() / left.square().mean() / 32
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            along = (W_dec * W_dec.grad).sum(1, keepdim=True)
            W_dec.grad.sub_(W_dec * along)
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            silent.add_(BATCH)
            silent[(codes > 0).any(0)] = 0

    return step


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine does at best."""

    flops: dict[str, float]
    """Operations a second of a large matrix product, by precision."""
    bandwidth: float
    """Bytes a second that a large copy reads and writes."""

    def floor(self, flops: float, n_bytes: float, precision: str = "float32") -> float:
        """Seconds that so much work takes at least."""
        return max(flops / self.flops[precision], n_bytes / self.bandwidth)


def this_machine() -> Machine:
    """Measure the two rates."""
    n, flops = 3072, {}
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(n, n).to(dtype)
        flops[precision] = 2 * n**3 / seconds_of(lambda a=a: a @ a)
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    return Machine(flops=flops, bandwidth=copied / seconds_of(lambda: target.copy_(source)))


def seconds_of(work: Callable[[], object]) -> float:
    """Median of some calls, after one of warm-up."""
    work()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def parts(d_sae: int = 4608) -> pd.DataFrame:
    """Each part of a TopK step without dead latents, beside its floor."""
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        d_sae=d_sae, activation=TopK(k=K), steps=10**6, normalize="none", auxk_alpha=0.0
    )
    keep_freed_memory()
    state = fresh_state(config, x, "cpu")
    for _ in range(3):
        train_step(state, x, config)
    sae, machine = state.sae, this_machine()
    with torch.no_grad():
        none = torch.zeros(0, dtype=torch.long)
        low, exact = torch.bfloat16, torch.float32

        def choose(dtype: torch.dtype) -> Chosen:
            return sae.choose(x, training=True, progress=0.0, dead=none, k_dead=0, dtype=dtype)[0]

        chosen = choose(exact)
        entries, values = chosen.entries, chosen.values
        error = torch.randn_like(x)
        assert sae.W_dec.grad is not None
        product, matrix, rows = 2 * BATCH * D_IN * d_sae, 4 * d_sae * D_IN, 4 * BATCH * D_IN
        sparse, decoded = 2 * BATCH * K * D_IN, matrix + rows
        timed = {
            "encoder product and choice, float32": (
                lambda: choose(exact), machine.floor(product, decoded)
            ),
            "encoder product and choice, bfloat16 nominates": (
                lambda: choose(low), machine.floor(product, decoded, "bfloat16")
            ),
            "of that: rounding the encoder": (
                lambda: ReducedEncoder.of(sae.W_enc, sae.b_enc), machine.floor(0, 1.5 * matrix)
            ),
            "decode": (
                lambda: kernels.weighted_rows(values, entries, sae.W_dec),
                machine.floor(sparse, decoded),
            ),
            "gradient of the codes": (
                lambda: kernels.row_products(error, sae.W_dec, entries),
                machine.floor(sparse, decoded),
            ),
            "gradients of both matrices": (
                lambda: [
                    kernels.transposed_product(values, entries, part, d_sae) for part in (error, x)
                ],
                2 * machine.floor(sparse, decoded),
            ),
            "projection and unit norm of the decoder": (
                lambda: (project_decoder_gradient(sae), normalise_decoder(sae)),
                machine.floor(0, 5 * matrix),
            ),
            "Adam": (state.optimizer.step, machine.floor(0, 7 * 2 * matrix)),
        }  # fmt: skip
        table = [
            {"part": name, "ms": 1e3 * seconds_of(work), "floor ms": 1e3 * floor}
            for name, (work, floor) in timed.items()
        ]
    for encoder in ("float32", "bfloat16"):
        whole = 1e3 * seconds_of(sparse_step(d_sae, False, x, encoder))
        unused = "bfloat16" if encoder == "float32" else "float32"
        floor = sum(
            row["floor ms"] for row in table
            if unused not in row["part"] and not row["part"].startswith(("of that", "whole"))
        )  # fmt: skip
        name = f"whole step, {encoder} encoder product"
        table.append({"part": name, "ms": whole, "floor ms": floor})
    found = pd.DataFrame(table)
    found["times its floor"] = found["ms"] / found["floor ms"]
    return found


def selections() -> pd.DataFrame:
    """Rows a second of top-AFA's selection beside the full sort, at first and after training."""
    tables = []
    for d_sae in SIZES:
        norms = torch.ones(d_sae)
        scores = torch.randn(BATCH, d_sae, generator=torch.Generator().manual_seed(0))
        # At first half of all pre-activations are positive, and nearly all of them are needed.
        for regime, pre in (("at initialisation", scores), ("few fire", scores - 2.0)):
            target = 0.98 * pre.relu().norm(dim=1)
            ways = {
                name: lambda select=select, p=pre, t=target, n=norms: select(p, n, t)
                for name, select in (
                    ("full sort", selection.nearest_norm_reference),
                    ("histogram", selection.nearest_norm),
                )
            }
            table = side_by_side(ways, BATCH, "rows", ROUNDS, settle=True)
            table.insert(0, "latents", d_sae)
            table.insert(1, "regime", regime)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    for table in (measure(), parts(), selections()):
        print(table.to_string(index=False, float_format="{:.4g}".format), end="\n\n")  # noqa: T201
