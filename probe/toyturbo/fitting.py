"""The one training loop behind every part of toy-turbo: seeded, checkpointed, exactly resumable.

The loss of a step is a function of the step's number alone, so that a run that goes on from a
checkpoint sees what it would have seen. A checkpoint is one safetensors file: weights, Adam's two
moments, the running average of the weights, and the number of the next step.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from tqdm import tqdm

from probe.errors import Failure
from probe.runs import atomic_path


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How long and how fast to train."""

    steps: int
    """Steps of the optimizer."""
    batch: int
    """Examples in a step."""
    lr: float
    """Largest learning rate: reached after 2 % of the steps, then a cosine down to 2 % of it."""
    ema: float = 0.0
    """Decay of the running average of the weights that is kept in the end; 0 keeps the last."""
    save_every: int = 200
    """Steps between checkpoints: the most that a killed run does again."""


def seeded(*numbers: int) -> Generator:
    """A generator of its own for every tuple of numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**62
    return Generator().manual_seed(seed)


def fit(
    path: Path,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    config: FitConfig,
    *,
    name: str,
    progress: bool = True,
) -> None:
    """Train the parameters of `module` that want gradients; leaves it as it is to be used.

    Args:
        path: the checkpoint; where it is there, training goes on from it.
        module: what is trained, on the device that the loss is computed on.
        loss: the loss of a step by the step's number.
        config: how long and how fast.
        name: for the progress bar.
        progress: show the bar on stderr.

    Raises `Failure` where the loss is not finite; the last checkpoint is kept.
    """
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    average = {key: p.detach().clone() for key, p in trained.items()}
    first = _restore(path, trained, average, optimizer) if path.is_file() else 0
    module.train()
    steps = range(first, config.steps)
    with tqdm(
        steps, name, initial=first, total=config.steps, unit="step", disable=not progress
    ) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _share(step, config.steps)
            value = loss(step)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{_finite(value, name, step):.4f}", refresh=False)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            _follow(average, trained.values(), min(config.ema, (step + 1) / (step + 10)))
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                _save(path, step + 1, trained, average, optimizer)
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(average[key])
    module.eval()


def _share(step: int, steps: int) -> float:
    """Part of the largest learning rate that a step has."""
    warm = max(1, steps // 50)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _finite(value: Tensor, name: str, step: int) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        raise Failure(
            f"the loss of {name} is not finite at step {step}; the checkpoint before it is kept: "
            "run the same command with a smaller learning rate."
        )
    return number


@torch.no_grad()
def _follow(average: dict[str, Tensor], values: Iterable[Tensor], decay: float) -> None:
    """Move the running average towards the weights; a decay of 0 copies them."""
    torch._foreach_lerp_(list(average.values()), [v.detach() for v in values], 1 - decay)


def _save(
    path: Path,
    step: int,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {"step": torch.tensor(step)}
    for key, parameter in trained.items():
        # A parameter that the loss does not reach has no state; zeros stand for it.
        state = optimizer.state[parameter] or {
            moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")
        }
        tensors |= {
            f"weights/{key}": parameter.detach(),
            f"average/{key}": average[key],
            f"first/{key}": state["exp_avg"],
            f"second/{key}": state["exp_avg_sq"],
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary)


@torch.no_grad()
def _restore(
    path: Path,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Put a checkpoint's tensors in place; gives the number of the next step."""
    with safe_open(path, framework="pt") as file:
        step = int(file.get_tensor("step"))
        if {key for key in file.keys() if key.startswith("weights/")} != {  # noqa: SIM118
            f"weights/{key}" for key in trained
        }:
            raise Failure(f"{path} is a checkpoint of other parameters; delete it to start over.")
        for key, parameter in trained.items():
            parameter.copy_(file.get_tensor(f"weights/{key}"))
            average[key].copy_(file.get_tensor(f"average/{key}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"first/{key}").to(parameter.device),
                "exp_avg_sq": file.get_tensor(f"second/{key}").to(parameter.device),
            }
    return step
