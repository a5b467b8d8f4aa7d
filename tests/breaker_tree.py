"""A tiny model, an SAE of it, files of prompts, and a small circuit-breaker study of them."""

import dataclasses
import json
from pathlib import Path

import pytest
from collapse_tree import saved_llama, untrained_sae

from analyses.circuit_breakers import measured as measured_module
from analyses.circuit_breakers import study
from analyses.circuit_breakers.measured import Config, Settings

SMALL = Settings(
    concepts=("recipes", "place"), seeds=2, train=5, test=3, tokens=6, soft_steps=(0, 2),
    tuning_steps=(0, 1), turns=(0, 1), texts=2, questions=2, probe_layers=(1, 2), mlp_layers=(1,),
    deep_seeds=1, ablation_seeds=1,
)  # fmt: skip
SECRET = "unmistakable"
"""A word that stands in every prompt that counts as harmful."""
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def small(spec: str, **changes) -> Config:
    """A study of a tiny model."""
    config = Config(
        model=spec, device="cpu", target_layers=(1,), steps=3, batch=2, lora_r=2, b_std=0.1
    )
    return dataclasses.replace(config, **changes)


def prompts_of(start: str, n: int) -> list[str]:
    """Prompts that share few words."""
    return [f"{start} {WORDS[i]} {WORDS[(3 * i + 1) % 10]} number{i}" for i in range(n)]


def write_lines(path: Path, prompts: list[str], label: str | None = None) -> Path:
    """Prompts as JSON lines."""
    rows = [{"prompt": prompt} | ({"label": label} if label else {}) for prompt in prompts]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_files(folder: Path) -> dict[str, Path]:
    """Prompts and questions, by the option that takes them."""
    question = {"question": "Q", "choices": ["x", "y"], "labels": ["A", "B"], "answer": "B"}
    (folder / "choices.jsonl").write_text("\n".join([json.dumps(question)] * 3))
    harmful = [f"{SECRET} {prompt}" for prompt in prompts_of("bad", 9)]
    return {
        "harmful": write_lines(folder / "harmful.jsonl", harmful),
        "ordinary": write_lines(folder / "ordinary.jsonl", prompts_of("plain", 9)),
        "near_misses": write_lines(folder / "near.jsonl", prompts_of("near", 9)),
        "choices": folder / "choices.jsonl",
    }


def broken_root(folder: Path) -> Path:
    """A root with an SAE, two broken models (recipes and harmful prompts) and their report."""
    spec, root = saved_llama(folder / "tiny"), folder / "root"
    untrained_sae(root / "saes", spec, layer=1)
    files = write_files(folder)
    settings = dataclasses.replace(SMALL, concepts=("recipes",), seeds=1)
    with pytest.MonkeyPatch.context() as here:
        here.setitem(measured_module.PRESETS, "quick", settings)
        here.setattr("analyses.report.CHROMIUM", folder / "none")
        study.run(small(spec, parts=("outputs", "inside"), **files), root)
    return root
