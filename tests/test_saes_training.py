"""Training, on an in-memory source whose every batch follows from its number."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import Failure, UserError
from probe.runs import Run, verify
from saes.activations import TopK
from saes.checkpoints import checkpoint_paths, load_checkpoint, save_checkpoint
from saes.folder import sae_metadata
from saes.losses import total_variance
from saes.training import (
    Job,
    TrainConfig,
    cut_metrics,
    fit,
    fresh_state,
    read_metrics,
    set_lr,
    train_step,
)

TIMING = ("tokens_per_s", "seconds")


class Memory:
    """Sparse mixtures of 40 directions in 16 dimensions, off centre; batch `i` has seed `i`."""

    n_rows = None

    def __init__(self, d: int = 16, scale: float = 5.0, pause: float = 0.0) -> None:
        self.d = d
        self.scale = scale
        self.pause = pause

    def batch(self, seed: int, n: int) -> Float[Tensor, "b d"]:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(40, self.d, generator=torch.Generator().manual_seed(-1))
        codes = torch.rand(n, 40, generator=generator)
        codes = codes * (torch.rand(n, 40, generator=generator) < 0.05)
        return self.scale * (codes @ directions + 1)

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        return self.batch(10**6, n)

    def batches(self, start: int) -> Iterator[Float[Tensor, "b d"]]:
        while True:
            time.sleep(self.pause)
            yield self.batch(start, 64)
            start += 1


def make_config(**changes) -> TrainConfig:
    values = {
        "d_sae": 64, "activation": TopK(k=4), "steps": 60, "lr": 5e-3, "warmup_steps": 5,
        "k_aux": 8, "dead_after_tokens": 256, "init_rows": 500, "log_every": 3,
        "checkpoint_every": 10,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def make_job(root: Path, name: str = "sae", **changes) -> Job:
    config = make_config(**changes)
    train = {key: str(value) for key, value in asdict(config).items()}
    run = Run.create(root, name, {"kind": "sae", "schema": 1, "train": train})
    metadata = {"hook_name": "blocks.1.hook_resid_post"}
    return Job(run=run, config=config, metadata=metadata, inputs={"store": "abc"})


def untimed(path: Path) -> list[dict[str, float]]:
    rows = read_metrics(path / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in TIMING} for row in rows]


def same_bits(a: Path, b: Path) -> bool:
    name = "sae_weights.safetensors"
    return (a / name).read_bytes() == (b / name).read_bytes() and untimed(a) == untimed(b)


def test_config_is_small_and_every_field_is_documented() -> None:
    assert len(fields(TrainConfig)) <= 20
    lines = Path(sys.modules[TrainConfig.__module__].__file__ or "").read_text().splitlines()
    for field in fields(TrainConfig):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[at + 1].startswith('    """'), field.name


@pytest.mark.parametrize("normalize", ["none", "scale", "layer_norm"])
def test_fit_learns_and_leaves_a_complete_folder(tmp_path: Path, normalize: str) -> None:
    job = make_job(tmp_path, normalize=normalize)
    (sae,) = fit([job], Memory(), progress=False)
    rows = read_metrics(job.run.path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(3, 61, 3))
    assert set(rows[0]) == {
        "step", "tokens", "loss", "mse", "further", "penalty", "auxk", "fvu", "l0", "dead_share",
        "code_over_input", "lr", *TIMING,
    }  # fmt: skip
    assert rows[-1]["tokens"] == 60 * 64
    assert rows[-1]["fvu"] < 0.6 * rows[0]["fvu"]
    assert job.run.complete and verify(job.run) == []
    assert job.run.summary["fvu"] == rows[-1]["fvu"]
    assert job.run.manifest["inputs"] == {"store": "abc"}
    assert sae_metadata(job.run.path)["hook_name"] == "blocks.1.hook_resid_post"
    assert [path.name for path in checkpoint_paths(job.run.path)] == ["step-000050", "step-000060"]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    # The folder reads raw activations: its error on fresh rows is the one training reported.
    x = Memory().batch(-5, 2000)
    error = (x - sae(x).reconstruction).square().sum(1).mean()
    assert float(error) / total_variance(x) == pytest.approx(rows[-1]["fvu"], rel=0.3)


def test_the_scale_does_not_depend_on_the_units(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path / name) for name in ("small", "large")]
    small = fit(jobs[:1], Memory(scale=1.0), progress=False)[0]
    large = fit(jobs[1:], Memory(scale=64.0), progress=False)[0]  # a power of two: no rounding
    torch.testing.assert_close(large.W_dec, small.W_dec, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(large.b_dec, 64 * small.b_dec, atol=1e-2, rtol=1e-3)


def test_a_complete_run_is_loaded_and_not_trained_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    first = fit([job], Memory(), progress=False)[0]
    again = fit([job], Memory(d=3), progress=False)[0]  # this source would not even fit
    assert torch.equal(first.W_enc, again.W_enc)


def test_jobs_on_one_stream_equal_jobs_alone(tmp_path: Path) -> None:
    configs = [{"activation": TopK(k=2)}, {"seed": 7, "steps": 40}]
    together = [make_job(tmp_path / "a", "sae", **changes) for changes in configs]
    fit(together, Memory(), progress=False)
    for job, changes in zip(together, configs, strict=True):
        alone = make_job(tmp_path / "b", "sae", **changes)
        fit([alone], Memory(), progress=False)
        assert same_bits(job.run.path, alone.run.path)


CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_saes_training import Memory, make_job
from saes.training import fit
root = Path({root!r})
jobs = [make_job(root), make_job(root, checkpoint_every=7, seed=1)]
fit(jobs, Memory(pause={pause}), progress=False)
"""


def start_child(root: Path, pause: float) -> subprocess.Popen[bytes]:
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(root), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)


def rows_written(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    killed, whole = (
        [make_job(tmp_path / name), make_job(tmp_path / name, checkpoint_every=7, seed=1)]
        for name in ("killed", "whole")
    )
    metrics = killed[1].run.path / "metrics.jsonl"
    child = start_child(tmp_path / "killed", pause=0.05)
    deadline = time.monotonic() + 120
    while rows_written(metrics) < 8 and time.monotonic() < deadline:  # step 24: between checkpoints
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not killed[0].run.complete and not killed[1].run.complete
    steps = [checkpoint_paths(job.run.path)[-1].name for job in killed]
    assert "step-000020" <= steps[0] < "step-000060" and "step-000021" <= steps[1] < "step-000060"
    assert start_child(tmp_path / "killed", pause=0).wait() == 0
    fit(whole, Memory(), progress=False)
    for a, b in zip(killed, whole, strict=True):
        assert same_bits(a.run.path, b.run.path)
        found, wanted = (load_checkpoint(job.run.path) for job in (a, b))
        assert found is not None and wanted is not None
        assert all(torch.equal(found[0][name], wanted[0][name]) for name in wanted[0])


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    job, whole = make_job(tmp_path / "a"), make_job(tmp_path / "b")
    (job.run.path / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n{"step": 6, "lo')
    fit([job], Memory(), progress=False)
    fit([whole], Memory(), progress=False)
    assert same_bits(job.run.path, whole.run.path)


def test_a_job_whose_last_step_was_saved_is_only_finished(tmp_path: Path) -> None:
    job, whole = make_job(tmp_path / "a"), make_job(tmp_path / "b")
    for one in (job, whole):
        fit([one], Memory(), progress=False)
    for name in ("manifest.json", "cfg.json", "golden.safetensors"):
        (job.run.path / name).unlink()
    fit([job], Memory(), progress=False)
    assert same_bits(job.run.path, whole.run.path) and job.run.complete


def test_cut_metrics_drops_later_and_torn_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, {"a": torch.full((3,), step)}, {"tokens": step})
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-000010", "step-000015"]
    (tmp_path / "checkpoints" / "step-000015" / "state.safetensors").write_bytes(b"x")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded[1]["tokens"] == 10 and loaded[0]["a"].tolist() == [10] * 3
    (tmp_path / "checkpoints" / "step-000010" / "state.json").write_text("{")
    with pytest.raises(Failure, match="no checkpoint"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "elsewhere") is None


def test_resuming_on_a_source_of_another_width_is_the_users_mistake(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    fit([job], Memory(), progress=False)
    (job.run.path / "manifest.json").unlink()
    with pytest.raises(UserError, match="width 16 and the source has width 9"):
        fit([job], Memory(d=9), progress=False)


def test_too_large_k_and_a_locked_folder_are_the_users_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose a smaller k"):
        fit([make_job(tmp_path, d_sae=3)], Memory(), progress=False)
    job = make_job(tmp_path)
    with job.run.lock(), pytest.raises(UserError, match="another process"):
        fit([job], Memory(), progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"decay_share": 1.5},
        {"k_aux": 0},
        {"log_every": 0},
    ],
)
def test_impossible_configs_are_the_users_mistakes(changes: dict[str, float]) -> None:
    with pytest.raises(UserError):
        make_config(**changes)


class Poisoned(Memory):
    def batches(self, start: int) -> Iterator[Float[Tensor, "b d"]]:
        for number, x in enumerate(super().batches(start), start):
            yield x * float("nan") if number == 20 else x


def test_non_finite_activations_stop_the_run(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with pytest.raises(Failure, match="NaN or infinite"):
        fit([job], Poisoned(), progress=False)
    assert not job.run.complete


def test_a_diverging_run_says_where_and_what_to_do(tmp_path: Path) -> None:
    job = make_job(tmp_path, lr=1e30)
    with pytest.raises(Failure, match=r"at step \d+; train with a lower lr"):
        fit([job], Memory(), progress=False)


def test_constant_activations_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="variance"):
        fit([make_job(tmp_path)], Memory(scale=0.0), progress=False)


def test_learning_rate_rises_holds_and_falls() -> None:
    config = make_config(steps=100, lr=1.0, warmup_steps=10, decay_share=0.2)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    rates = [set_lr(optimizer, config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[50] == 1.0
    assert rates[79] == 1.0 and rates[90] == 0.5 and rates[99] == 0.05
    assert optimizer.param_groups[0]["lr"] == 0.05
    flat = make_config(steps=3, lr=1.0, warmup_steps=0, decay_share=0.0)
    assert [set_lr(optimizer, flat, step) for step in range(3)] == [1.0, 1.0, 1.0]


def test_silence_counts_tokens_and_ends_when_a_latent_fires() -> None:
    config = make_config(dead_after_tokens=64)
    state = fresh_state(config, Memory().sample(500), "cpu")
    x = Memory().batch(1, 64)
    first = train_step(state, x, config)
    assert first["dead_share"] == 0.0 and first["auxk"] == 0.0
    assert set(state.silent_tokens.tolist()) == {0, 64}
    silent = float((state.silent_tokens == 64).float().mean())
    second = train_step(state, x, config)
    assert second["dead_share"] == pytest.approx(silent) and second["auxk"] > 0.0
    off = make_config(dead_after_tokens=64, auxk_alpha=0.0)
    assert train_step(state, x, off)["auxk"] == 0.0


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_only_auxk_reaches_a_latent_that_never_wins(alpha: float) -> None:
    config = make_config(dead_after_tokens=100, auxk_alpha=alpha)
    state = fresh_state(config, Memory().sample(500), "cpu")
    with torch.no_grad():
        state.sae.W_enc[:, 60:] *= 1e-3
    state.silent_tokens[60:] = 100
    before = state.sae.W_enc.detach().clone()
    metrics = train_step(state, Memory().batch(1, 64), config)
    changed = (state.sae.W_enc != before).any(0)
    assert metrics["dead_share"] == 4 / 64
    assert bool(changed[:60].any()) and bool(changed[60:].all()) == (alpha > 0)
    assert state.silent_tokens[60:].tolist() == [164] * 4  # taking part in AuxK is not firing


def test_one_step_equals_plain_adam_on_dense_gradients() -> None:
    config = make_config(warmup_steps=0, decay_share=0.0, normalize="none")
    state = fresh_state(config, Memory().sample(500), "cpu")
    sae, x = state.sae, Memory().batch(3, 64)
    plain = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    optimizer = torch.optim.Adam(
        plain.values(), lr=config.lr, betas=config.betas, eps=config.eps, foreach=False
    )
    for _ in range(3):
        pre = (x - plain["b_dec"]) @ plain["W_enc"] + plain["b_enc"]
        values, indices = pre.topk(4)
        codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
        error = x - codes @ plain["W_dec"] - plain["b_dec"]
        optimizer.zero_grad()
        (error.square().sum(1).mean() / state.loss_variance).backward()
        with torch.no_grad():
            W, gradient = plain["W_dec"], plain["W_dec"].grad
            assert gradient is not None
            gradient -= W * (W * gradient).sum(1, keepdim=True)
            optimizer.step()
            W /= W.norm(dim=1, keepdim=True)
        train_step(state, x, config)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter, plain[name], atol=2e-4, rtol=1e-3, msg=name)


def test_logged_rows_are_json_with_ordinary_numbers(tmp_path: Path) -> None:
    job = make_job(tmp_path, steps=3)
    fit([job], Memory(), progress=False)
    for line in (job.run.path / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for value in json.loads(line).values())
