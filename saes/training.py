"""Training SAEs on a stream of activations.

One step (Gao et al. 2024, arXiv 2406.04093, and openai/sparse_autoencoder `train.py`):

1. encode, keep the active latents, decode; the dead latents reconstruct the residual (AuxK);
2. loss = squared error over the source's variance + alpha * AuxK (`saes.losses`);
3. backward; project the gradient off the decoder rows; Adam; normalise the decoder rows;
4. the tokens since each latent last fired go up by the batch, and to 0 where it fired. A latent is
   dead once it has been silent for `dead_after_tokens`. This count belongs to training, not to the
   model.

The learning rate rises linearly over `warmup_steps` and falls linearly to 0 over the last
`decay_share` of all steps.

Several SAEs may share one stream: each job has its own run folder and its own state, sees each
batch once, and does not depend on the others. Everything that decides the result is in the
checkpoint (parameters, Adam's moments, random generator, silent counts, step = position in the
data), and `metrics.jsonl` is cut back to the checkpoint's step, so a run killed at any moment ends
with the same bits as one left alone, on one machine with one number of threads.

Several processes may train together. What they divide, the rows of each batch (`saes.replicas`) or
the latents (`saes.sharded`), and what they therefore exchange, is a `Division`'s business; the step
below is the same for all. The first rank writes metrics and the finished folder.
"""

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from probe.errors import Failure, UserError
from probe.loader import ActivationSource
from probe.runs import Run, atomic_path
from saes import afa
from saes.activations import Activation, BatchTopK, KSparse, Matryoshka, TopK, activation_name
from saes.checkpoints import load_checkpoint, save_checkpoint
from saes.constraints import (
    fold_scale,
    initialise,
    normalise_decoder,
    project_decoder_gradient,
)
from saes.folder import load_sae, save_sae
from saes.losses import total_variance
from saes.memory import keep_freed_memory
from saes.models import SaeConfig, SparseAutoencoder
from saes.replicas import Replicas
from saes.sharded import Shards
from saes.types import TrainingOutput

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
MetricsRow = dict[str, int | float]
"""One line of `metrics.jsonl`: numbers by name."""
NORMALIZE = ("none", "scale", "layer_norm")
ENCODER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
THRESHOLD_RATE = 0.1
"""Share of the newest batch in the running threshold of batch-wise activations. SAELens takes 0.01,
which lags behind codes that shrink: after 200 batches of 512 rows of SmolLM2-135M (layer 12, k =
64) BatchTopK's L0 by its threshold was 30.8 with 0.01, and is 64.2 with 0.1."""
GOLDEN_ROWS = 32
"""Rows of the source kept with the SAE to check it on every load."""
Division = Replicas | Shards
"""How several processes share the work."""
ALL_HERE = Replicas()
"""One process does it all."""
Sample = Callable[[ActivationSource, int], Float[Tensor, "n d"]]
"""Gives so many rows of a source; asked twice, it remembers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that decides what one training run does with its stream of batches."""

    d_sae: int = 4608
    """Number of latents."""
    activation: Activation = TopK()  # noqa: RUF009 (frozen)
    """What makes codes of pre-activations."""
    steps: int = 500
    """Batches to train on; the source decides how many rows a batch has."""
    normalize: Literal["none", "scale", "layer_norm"] = "scale"
    """`scale`: inputs times sqrt(d_in) / their mean norm, undone in the saved SAE, which reads raw
    activations. `layer_norm`: every row standardised, in the saved SAE too (their code)."""
    lr: float = 3e-3
    """Adam's peak learning rate; the best for 400 steps of 2048 rows of SmolLM2-135M (4608 latents)
    lies between 2e-3 and 4e-3. Runs of 100 M tokens want less: 2e-4 / sqrt(d_sae / 2**14)
    (EleutherAI sparsify)."""
    warmup_steps: int = 50
    """Steps of linear rise of the learning rate."""
    decay_share: float = 0.2
    """Share of all steps, at the end, over which the learning rate falls to 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates. Gao et al. 2024, code."""
    eps: float = 6.25e-10
    """Adam's epsilon. Gao et al. 2024, code."""
    k_aux: int = 64
    """Dead latents that reconstruct the residual of a row at most. Gao et al. 2024, code: 256,
    which costs more and revived no more here (18432 latents, 250 steps of 2048 rows, dead after 50k
    tokens: 4.5% dead with 256, 4.3% with 64, 13.6% without AuxK)."""
    auxk_alpha: float = 1 / 32
    """Weight of the AuxK term; 0 turns it off. Gao et al. 2024, appendix A.2."""
    dead_after_tokens: int = 100_000
    """Tokens without firing after which a latent is dead. Gao et al. 2024: 10 M, of billions."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the dense product that chooses latents; bfloat16, for topk alone, is faster
    where the processor has it and chooses the same latents (`saes.reduced`). Values, gradients and
    parameters are float32 in any case."""
    init_rows: int = 8192
    """Rows sampled for geometric median, variance and scale. Gao et al. 2024, code: 32,768."""
    seed: int = 0
    """Seed of the random decoder."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name, known in (("normalize", NORMALIZE), ("encoder_dtype", ENCODER_DTYPES)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        for name in ("steps", "init_rows", "log_every", "checkpoint_every", "dead_after_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.lr > 0 or self.warmup_steps < 0 or not 0 <= self.decay_share <= 1:
            raise UserError(
                f"lr must be above 0, warmup_steps at least 0 and decay_share between 0 and 1; got "
                f"{self.lr}, {self.warmup_steps} and {self.decay_share}."
            )
        if self.encoder_dtype != "float32" and not isinstance(self.activation, TopK):
            raise UserError(
                f"encoder_dtype {self.encoder_dtype} is for topk; "
                f"{activation_name(self.activation)} takes float32, since every pre-activation "
                "counts."
            )
        if self.k_aux < 1 or self.auxk_alpha < 0:
            raise UserError(
                f"k_aux must be at least 1 and auxk_alpha at least 0, got {self.k_aux} and "
                f"{self.auxk_alpha}; auxk_alpha = 0 turns AuxK off."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One SAE to train: where it is written and how it is trained."""

    run: Run
    """Its folder, made by `Run.create`."""
    config: TrainConfig
    """How it is trained."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What `cfg.json` says of where the SAE belongs: see `saes.folder.save_sae`."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hashes of what it was made from, by name, for the manifest."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """All that changes during training, and the two numbers measured before it."""

    sae: SparseAutoencoder
    optimizer: torch.optim.Adam
    parameters: dict[str, Tensor]
    """What the optimiser steps: see `optimised_parameters`."""
    generator: torch.Generator
    """Source of all randomness of the run."""
    silent_tokens: Int[Tensor, " s"]
    """Tokens since each latent last fired."""
    scale: float
    """Factor on the inputs (1 unless `normalize` is `scale`)."""
    variance: float
    """Total variance of the source in raw units: mean of |x - mean|^2 over the sample."""
    loss_variance: float
    """The same of what the loss is taken on (scaled or standardised rows)."""
    step: int = 0
    """Steps done; the next batch's number."""
    tokens: int = 0
    """Rows seen."""
    seconds: float = 0.0
    """Time spent in steps."""


def fit(
    jobs: Sequence[Job],
    source: ActivationSource | Sequence[ActivationSource],
    *,
    device: str = "cpu",
    progress: bool = True,
    division: Division = ALL_HERE,
) -> list[SparseAutoencoder]:
    """Train every job's SAE on one pass through `source`, write their folders, return the SAEs.

    Of several sources each job has its own, in the jobs' order; they are read in step, each
    different one once. Complete runs are loaded, incomplete ones resumed. Where several ranks
    divide the work, each calls this with a source that gives the same batches, and the first one
    returns the SAEs, the others none. Raises `UserError` where a config does not fit the source or
    the division, `Failure` where activations or the loss are not finite.
    """
    keep_freed_memory()
    ranks = division.ranks
    sources = source if isinstance(source, Sequence) else [source] * len(jobs)
    with contextlib.ExitStack() as held:
        for job in jobs:
            held.enter_context(ranks.lock(job.run))
            division.check(job.config.d_sae, job.config.activation)
        sample = functools.cache(sample_rows)
        training = [
            (job, own, start(job, own, sample, device, division))
            for job, own in zip(jobs, sources, strict=True)
            if not ranks.first_says(job.run.complete)
        ]
        train(training, sample, progress and ranks.is_first, division)
        ranks.wait()
    return [load_sae(job.run.path) for job in jobs if ranks.is_first]


def sample_rows(source: ActivationSource, n: int) -> Float[Tensor, "n d"]:
    """`n` rows of the source, or all where it has fewer."""
    return source.sample(n if source.n_rows is None else min(n, source.n_rows))


def train(
    training: Sequence[tuple[Job, ActivationSource, TrainState]],
    sample: Sample,
    progress: bool,
    division: Division = ALL_HERE,
) -> None:
    """Take every state to its job's last step, and finish each job as it gets there.

    The sources start where the job that is furthest behind stands; the others wait for it.
    """
    for job, source, state in training:
        if state.step == job.config.steps:
            finish(job, source, state, sample, division)
    training = [each for each in training if each[2].step < each[0].config.steps]
    if not training:
        return
    first = min(state.step for _, _, state in training)
    last = max(job.config.steps for job, _, _ in training)
    sources = {id(source): source for _, source, _ in training}
    streams = {key: division.batches(source, first) for key, source in sources.items()}
    with tqdm(total=last, initial=first, desc="train", unit="step", disable=not progress) as bar:
        for step in range(first, last):
            batches = {key: next(stream) for key, stream in streams.items()}
            for job, source, state in training:
                if state.step == step < job.config.steps:
                    x = batches[id(source)]
                    bar.set_postfix(advance(job, state, x, division), refresh=False)
                    if state.step == job.config.steps:
                        finish(job, source, state, sample, division)
            bar.update()


def start(
    job: Job,
    source: ActivationSource,
    sample: Sample,
    device: str,
    division: Division = ALL_HERE,
) -> TrainState:
    """The state a job begins with: its newest checkpoint's, or a fresh one."""
    own = division.latents(job.config.d_sae)
    config = replace(job.config, d_sae=len(own))
    checkpoint = load_checkpoint(job.run.path, latents=own, ranks=division.ranks)
    if checkpoint is None:
        state = fresh_state(config, sample(source, config.init_rows), device)
        division.begin(state.sae, state.generator)
    else:
        state = restored_state(config, source.d, *checkpoint, device)
    if division.ranks.is_first:
        cut_metrics(job.run.path / METRICS, state.step)
    return state


def advance(
    job: Job, state: TrainState, x: Float[Tensor, "b d"], division: Division = ALL_HERE
) -> dict[str, str]:
    """One step of one job, with what is logged and kept of it; returns numbers for the bar."""
    began, before = time.perf_counter(), state.tokens
    metrics = train_step(state, x, job.config, division)
    spent = time.perf_counter() - began
    state.seconds += spent
    timing = {"tokens_per_s": (state.tokens - before) / spent, "seconds": state.seconds}
    done = state.step == job.config.steps
    if division.ranks.is_first and is_logged(job.config, state.step):
        append_metrics(job.run.path / METRICS, metrics | timing)
    if division.writes and (done or state.step % job.config.checkpoint_every == 0):
        save_checkpoint(job.run.path, state.step, *state_contents(state), division.holders)
    shown = {name: f"{metrics[name]:.4g}" for name in ("loss", "fvu", "l0", "dead_share")}
    return shown | {"rows/s": f"{timing['tokens_per_s']:,.0f}"}


def train_step(
    state: TrainState, x: Float[Tensor, "b d"], config: TrainConfig, division: Division = ALL_HERE
) -> MetricsRow:
    """Train on one batch; returns its metrics. Raises `Failure` where the loss is not finite.

    `x` is what `division` gives this rank of the batch.
    """
    sae, optimizer = state.sae, state.optimizer
    n_rows = division.n_rows(x)
    x = x.to(sae.W_dec.device)
    is_dead = state.silent_tokens >= config.dead_after_tokens
    dead = is_dead.nonzero().squeeze(1) if config.auxk_alpha else is_dead.new_zeros(0).long()
    output = division.forward(
        sae,
        x if state.scale == 1 else x * state.scale,
        dead=dead,
        k_aux=config.k_aux,
        encoder_dtype=ENCODER_DTYPES[config.encoder_dtype],
        progress=state.step / config.steps,
    )
    loss = division.loss(
        output,
        config.activation,
        variance=state.loss_variance,
        auxk_alpha=config.auxk_alpha,
        n_rows=n_rows,
    )
    terms = division.totals(loss.metrics())
    if not math.isfinite(terms["loss"]):
        raise Failure(
            f"the loss is {terms['loss']} at step {state.step + 1}; train with a lower lr (it is "
            f"{config.lr}) or a longer warmup, and look for outliers in the activations."
        )
    lr = set_lr(optimizer, config, state.step)
    sae.zero_grad(set_to_none=True)
    loss.total.backward()
    share_gradients(state)
    division.exchange_gradients(state.parameters)
    if not sae.config.tied:
        project_decoder_gradient(sae)
    optimizer.step()
    if not sae.config.tied:
        normalise_decoder(sae)
    follow_threshold(sae, output, first=state.step == 0)
    count_silence(state.silent_tokens, output.fired, n_rows)
    state.step += 1
    state.tokens += n_rows
    means = {"fvu": raw_error(state, x, loss.errors) / state.variance, "l0": output.l0}
    if is_logged(config, state.step):
        means["code_over_input"] = code_over_input(state, output, division)
    return {
        "step": state.step,
        "tokens": state.tokens,
        **terms,
        **division.averaged(means, len(x) / n_rows),
        "dead_share": division.dead_share(is_dead),
        "lr": lr,
    }


def is_logged(config: TrainConfig, step: int) -> bool:
    """Whether `metrics.jsonl` gets a row after this many steps."""
    return step == config.steps or step % config.log_every == 0


def set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Set and return the learning rate of step number `step` (from 0)."""
    rise = (step + 1) / max(1, config.warmup_steps)
    fall = (config.steps - step) / max(1.0, config.decay_share * config.steps)
    lr = config.lr * min(1.0, rise, fall)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


@torch.no_grad()
def count_silence(silent_tokens: Int[Tensor, " s"], fired: Bool[Tensor, " s"], n_rows: int) -> None:
    """Add a batch to every latent's silence, and end that of the latents that fired in it."""
    silent_tokens += n_rows
    silent_tokens[fired] = 0


@torch.no_grad()
def follow_threshold(sae: SparseAutoencoder, output: TrainingOutput, *, first: bool) -> None:
    """Move the threshold of a batch-wise activation towards the smallest activation kept.

    A running mean, which the first batch sets.
    """
    if isinstance(sae.config.activation, BatchTopK | Matryoshka) and output.smallest is not None:
        sae.threshold.lerp_(
            torch.full_like(sae.threshold, output.smallest), 1.0 if first else THRESHOLD_RATE
        )


@torch.no_grad()
def code_over_input(state: TrainState, output: TrainingOutput, division: Division) -> float:
    """Mean of ||f|| / ||x - b_dec|| over own rows: above 1 is over-, below 1 under-activation."""
    norms = torch.linalg.vector_norm(state.sae.W_dec, dim=1)
    codes = division.code_norms(afa.code_norms(output.values, output.entries, norms))
    inputs = afa.approximate_norms(output.target, state.sae.b_dec).clamp_min(afa.TINY)
    return float((codes / inputs).mean())


@torch.no_grad()
def raw_error(state: TrainState, x: Float[Tensor, "b d"], errors: Float[Tensor, " b"]) -> float:
    """Mean of |x - xhat|^2 over the batch in raw units: the normalisation of `errors` undone."""
    errors = errors / state.scale**2
    if state.sae.config.normalize == "layer_norm":
        errors = errors * x.float().var(-1)
    return float(errors.mean())


def fresh_state(config: TrainConfig, sample: Float[Tensor, "n d"], device: str) -> TrainState:
    """The state before the first step, from a sample of the source."""
    sample = sample.float()
    d_in = sample.shape[1]
    mean_norm = float(torch.linalg.vector_norm(sample, dim=1).double().mean())
    variance = total_variance(sample)
    if not (math.isfinite(variance) and variance > 0):
        raise Failure(
            f"the activations' variance over a sample of {len(sample)} rows is {variance}; capture "
            "them again, in float32 where the model overflows in half precision."
        )
    scale = math.sqrt(d_in) / mean_norm if config.normalize == "scale" else 1.0
    generator = torch.Generator().manual_seed(config.seed)
    sae = make_sae(config, d_in)
    initialise(sae, sample * scale, generator)
    target = sae.training_input(sample * scale)
    parameters = optimised_parameters(sae.to(device))
    return TrainState(
        sae=sae,
        optimizer=make_optimizer(parameters, config),
        parameters=parameters,
        generator=generator,
        silent_tokens=torch.zeros(config.d_sae, dtype=torch.long, device=device),
        scale=scale,
        variance=variance,
        loss_variance=total_variance(target),
    )


def make_sae(config: TrainConfig, d_in: int) -> SparseAutoencoder:
    """The SAE that `config` trains, all parameters zero."""
    return SparseAutoencoder(sae_shape(config, d_in))


def sae_shape(config: TrainConfig, d_in: int) -> SaeConfig:
    """What `config` makes of activations of width `d_in`; raises `UserError` where it cannot be."""
    return SaeConfig(
        d_in=d_in,
        d_sae=config.d_sae,
        activation=config.activation,
        normalize="layer_norm" if config.normalize == "layer_norm" else "none",
        tied=isinstance(config.activation, KSparse),
    )


def optimised_parameters(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The SAE's parameters by name, `W_enc` as the contiguous matrix that it is a view of.

    The fused Adam step would copy a transposed parameter on every call.
    """
    parameters: dict[str, Tensor] = dict(sae.named_parameters())
    if sae.config.tied:
        return parameters
    return parameters | {"W_enc": nn.Parameter(sae.W_enc.detach().T)}


def share_gradients(state: TrainState) -> None:
    """Show the optimiser the gradient of `W_enc`, transposed as the parameter is."""
    if state.sae.config.tied:
        return
    assert state.sae.W_enc.grad is not None, "no gradient: call backward first"
    state.parameters["W_enc"].grad = state.sae.W_enc.grad.T


def make_optimizer(parameters: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.Adam:
    """Adam in one fused pass over the parameters."""
    return torch.optim.Adam(
        parameters.values(), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def state_contents(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds: tensors and numbers."""
    tensors = {
        "silent_tokens": state.silent_tokens,
        "generator": state.generator.get_state(),
    }
    tensors |= {f"buffer.{name}": buffer for name, buffer in state.sae.named_buffers()}
    for name, parameter in state.parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = state.optimizer.state[parameter][moment]
    names = ("scale", "variance", "loss_variance", "tokens", "seconds")
    return tensors, {name: getattr(state, name) for name in names}


@torch.no_grad()
def restored_state(
    config: TrainConfig,
    d_in: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    device: str,
) -> TrainState:
    """The state a checkpoint holds. Raises `UserError` where the source has another width."""
    found = tensors["parameter.b_dec"].shape[0]
    if found != d_in:
        raise UserError(
            f"the checkpoint is of an SAE for activations of width {found} and the source has "
            f"width {d_in}; train on the source it was started on."
        )
    sae, parameters = restored_sae(config, d_in, tensors, device)
    optimizer = make_optimizer(parameters, config)
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            moment: tensors[f"{moment}.{name}"].clone().to(device) for moment in MOMENTS
        }
    generator = torch.Generator()
    generator.set_state(tensors["generator"])
    return TrainState(
        sae=sae,
        optimizer=optimizer,
        parameters=parameters,
        generator=generator,
        silent_tokens=tensors["silent_tokens"].clone().to(device),
        scale=numbers["scale"],
        variance=numbers["variance"],
        loss_variance=numbers["loss_variance"],
        step=numbers["step"],
        tokens=numbers["tokens"],
        seconds=numbers["seconds"],
    )


@torch.no_grad()
def restored_sae(
    config: TrainConfig, d_in: int, tensors: Mapping[str, Tensor], device: str
) -> tuple[SparseAutoencoder, dict[str, Tensor]]:
    """The SAE that a checkpoint holds, and its parameters as the optimiser sees them."""
    sae = make_sae(config, d_in).to(device)
    parameters = optimised_parameters(sae)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])
    for name, buffer in sae.named_buffers():
        buffer.copy_(tensors[f"buffer.{name}"])
    return sae, parameters


def whole_sae(job: Job, state: TrainState) -> SparseAutoencoder:
    """The SAE of a job at its last step, on the CPU; from its checkpoint where a part is here."""
    if state.sae.config.d_sae == job.config.d_sae:
        return state.sae.cpu()
    kept = ("parameter.", "buffer.")
    checkpoint = load_checkpoint(job.run.path, wanted=lambda name: name.startswith(kept))
    if checkpoint is None or checkpoint[1]["step"] != state.step:
        raise Failure(
            f"the checkpoint of step {state.step} in {job.run.path} cannot be read; run the same "
            "command again."
        )
    return restored_sae(job.config, state.sae.config.d_in, checkpoint[0], "cpu")[0]


def finish(
    job: Job,
    source: ActivationSource,
    state: TrainState,
    sample: Sample,
    division: Division = ALL_HERE,
) -> None:
    """Fold the scale into the SAE, write its folder and the manifest; the first rank does."""
    golden_x = sample(source, GOLDEN_ROWS)
    if not division.ranks.is_first:
        return
    device = str(state.sae.W_dec.device)
    sae = whole_sae(job, state)
    if not sae.config.tied:
        normalise_decoder(sae)
    fold_scale(sae, state.scale)
    save_sae(sae, job.run.path, metadata=job.metadata, golden_x=golden_x)
    last = read_metrics(job.run.path / METRICS)[-1]
    kept = ("tokens", "loss", "fvu", "l0", "dead_share", "seconds")
    shape = {
        "d_in": sae.config.d_in,
        "d_sae": sae.config.d_sae,
        "activation": activation_name(sae.config.activation),
    }
    job.run.finish(
        summary=shape | {"steps": state.step} | {name: last[name] for name in kept},
        inputs=dict(job.inputs),
        seeds={"train": job.config.seed},
        device=device,
    )


def append_metrics(path: Path, row: MetricsRow) -> None:
    """Add one row to `metrics.jsonl`."""
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[MetricsRow]:
    """The rows of `metrics.jsonl`; a last line that a killed process left unfinished is ignored."""
    if not path.is_file():
        return []
    return list(_whole_rows(path.read_text().splitlines(keepends=True)))


def _whole_rows(lines: Sequence[str]) -> Iterator[MetricsRow]:
    for line in lines:
        if not line.endswith("\n"):
            return
        yield json.loads(line)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step`: those steps are about to be done again."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
