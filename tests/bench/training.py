"""One training step: sparse kernels against plain dense autograd with the same arithmetic."""

from collections.abc import Callable

import pandas as pd
import torch
from torch.nn import functional

from saes.activations import TopK
from saes.training import TrainConfig, fresh_state, train_step
from tests.bench.timing import side_by_side

D_IN, BATCH, K = 576, 2048, 32


def measure() -> pd.DataFrame:
    """Tokens a second of a step, for two sizes of dictionary, without dead latents and with."""
    tables = []
    for d_sae in (4608, 18432):
        for dead in (False, True):
            x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
            ways = {
                "dense autograd": dense_step(d_sae, dead, x),
                "sparse kernels": sparse_step(d_sae, dead, x, "float32"),
                "sparse kernels, bfloat16 encoder": sparse_step(d_sae, dead, x, "bfloat16"),
            }
            table = side_by_side(ways, BATCH, "tokens")
            table.insert(0, "latents", d_sae)
            table.insert(1, "dead", "all but those that fire" if dead else "none")
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def sparse_step(d_sae: int, dead: bool, x: torch.Tensor, encoder: str) -> Callable[[], object]:
    """The project's own step."""
    config = TrainConfig(
        d_sae=d_sae,
        activation=TopK(k=K),
        steps=10**6,
        normalize="none",
        dead_after_tokens=1 if dead else 10**12,
        encoder_dtype="bfloat16" if encoder == "bfloat16" else "float32",
    )
    state = fresh_state(config, x, "cpu")
    return lambda: train_step(state, x, config)


def dense_step(d_sae: int, dead: bool, x: torch.Tensor) -> Callable[[], None]:
    """TopK and AuxK written down plainly: dense codes, dense products, autograd, fused Adam."""
    generator = torch.Generator().manual_seed(0)
    W_dec = functional.normalize(torch.randn(d_sae, D_IN, generator=generator), dim=1)
    W_enc = W_dec.T.clone().requires_grad_()
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
            off = pre.masked_fill(silent == 0, -torch.inf)
            guess = top(off, 256) @ W_dec
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
