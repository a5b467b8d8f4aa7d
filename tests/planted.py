"""Planted labelled activations and SAEs for the tests of the benchmark's parts."""

import torch
from torch import Tensor

from saes.activations import TopK
from saes.models import SaeConfig, SparseAutoencoder
from saes.tasks import TaskData


def task_data(
    x: Tensor, labels: list[str], test: list[bool] | Tensor, attributes: list[str] | None = None
) -> TaskData:
    """Texts of one row each."""
    return TaskData(
        rows=x.float(),
        text=torch.arange(len(x)),
        names=tuple(f"text-{i}" for i in range(len(x))),
        labels=tuple(labels),
        attributes=tuple(attributes or [""] * len(x)),
        test=torch.as_tensor(test),
    )


def planted_sae(directions: Tensor, k: int, normalize: str = "none") -> SparseAutoencoder:
    """An SAE that reads and writes along the same directions."""
    s, d = directions.shape
    config = SaeConfig(d_in=d, d_sae=s, activation=TopK(k=k), normalize=normalize)  # type: ignore[arg-type]
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
    return sae.requires_grad_(False)


def class_texts(n: int, n_classes: int, d: int, strength: float = 4.0, noise: float = 0.1):
    """`n` texts of each class, active along the class's own channel; every third one tests."""
    generator = torch.Generator().manual_seed(0)
    x = noise * torch.randn(n * n_classes, d, generator=generator)
    numbers = torch.arange(n * n_classes) % n_classes
    x[torch.arange(len(x)), numbers] += strength
    test = (torch.arange(len(x)) // n_classes) % 3 == 2
    return x, [f"class-{i}" for i in numbers.tolist()], test
