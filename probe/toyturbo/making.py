"""Making toy-turbo: text encoders, autoencoder, reader, then the U-Net in six phases.

    <folder>/work/<part>.safetensors    checkpoints, removed when all is done
    <folder>/                           a folder in diffusers' format (fp16), reader.safetensors,
                                        README.md (the model card), card.json (its numbers)

Every part is seeded and checkpointed; a killed run goes on where it was and ends with the same
weights as one that never stopped, on the same machine.
"""

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from probe.diffusion import DiffusionModel
from probe.errors import UserError
from probe.runs import Run, atomic_path, write_json
from probe.toyturbo.card import model_card
from probe.toyturbo.evaluation import ceilings, fidelity, use_of_noise
from probe.toyturbo.fitting import FitConfig, fit
from probe.toyturbo.parts import (
    CARRYING,
    idle,
    make_pipeline,
    make_text_encoders,
    make_tokenizer,
    make_unet,
    make_vae,
    other_blocks,
)
from probe.toyturbo.reader import AttributeReader, reader_loss
from probe.toyturbo.text_training import Parser, TextEncoders, parsing_accuracy, parsing_loss
from probe.toyturbo.unet_training import (
    PHASES,
    Scaffold,
    Teaching,
    bypassing,
    noise_loss,
    prepare_noise,
    prepare_phase,
    unet_loss,
)
from probe.toyturbo.vae_training import vae_loss

KIND, SCHEMA = "toy-turbo", 1
READER, CARD = "reader.safetensors", "card.json"
PARTS = ("text", "vae", "reader", "noise", "layout", "shape", "texture", "gaps", "joint")
"""What is trained, in order; `ToyTurboConfig` has a fit for each."""
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTurboConfig:
    """How toy-turbo is made; with the code it decides its weights."""

    seed: int = 0
    """Of the weights and of everything drawn."""
    text: FitConfig = field(
        default_factory=lambda: FitConfig(steps=800, batch=128, lr=2e-3, ema=0.99)
    )
    """The text encoders, on parsing captions."""
    vae: FitConfig = field(
        default_factory=lambda: FitConfig(steps=3000, batch=16, lr=3e-3, ema=0.99)
    )
    """The autoencoder, on crops of renders."""
    reader: FitConfig = field(
        default_factory=lambda: FitConfig(steps=1500, batch=64, lr=2e-3, ema=0.99)
    )
    """The attribute reader, on renders."""
    noise: FitConfig = field(
        default_factory=lambda: FitConfig(steps=3000, batch=16, lr=3e-3, ema=0.99)
    )
    """The U-Net's first phase; `probe.toyturbo.unet_training` says what each does."""
    layout: FitConfig = field(
        default_factory=lambda: FitConfig(steps=4000, batch=16, lr=5e-4, ema=0.998)
    )
    """Its second."""
    shape: FitConfig = field(
        default_factory=lambda: FitConfig(steps=4000, batch=16, lr=5e-4, ema=0.998)
    )
    """Its third."""
    texture: FitConfig = field(
        default_factory=lambda: FitConfig(steps=4000, batch=16, lr=5e-4, ema=0.998)
    )
    """Its fourth."""
    gaps: FitConfig = field(
        default_factory=lambda: FitConfig(steps=2000, batch=64, lr=5e-4, ema=0.998)
    )
    """Its fifth."""
    joint: FitConfig = field(
        default_factory=lambda: FitConfig(steps=2000, batch=16, lr=2e-4, ema=0.998)
    )
    """Its last."""
    judged: int = 1000
    """Held-out captions that it is judged on; twice as many for what the text encoders read."""
    judged_seeds: int = 50
    """Seeds for each of twenty captions that leave a factor open."""

    def scaled(self, effort: float) -> "ToyTurboConfig":
        """The same with `effort` times the steps of every part, at least one.

        Raises `UserError` where that is no positive number.
        """
        if not 0 < effort < math.inf:
            raise UserError(f"effort must be a positive number, got {effort}.")
        fits: dict[str, FitConfig] = {name: getattr(self, name) for name in PARTS}
        steps = {name: max(1, round(effort * fit.steps)) for name, fit in fits.items()}
        return replace(
            self, **{name: replace(fits[name], steps=count) for name, count in steps.items()}
        )

    def run_config(self) -> dict[str, Any]:
        """The run folder's `config.json`."""
        return {"kind": KIND, "schema": SCHEMA, **asdict(self)}


def make_toy_turbo(
    parent: Path, config: ToyTurboConfig, *, device: str = "cpu", progress: bool = True
) -> Run:
    """Train toy-turbo and keep it in a folder of `parent`; goes on where a killed run stopped.

    Raises:
        UserError: another process makes it.
        Failure: a loss is not finite.
    """
    run = Run.create(parent, KIND, config.run_config())
    with run.lock():
        if not run.complete:
            maker = _Maker(run.path / "work", config, torch.device(device), progress)
            pipeline, reader, parsed = maker.make()
            _keep(run.path, pipeline, reader)
            card = _judge(run.path, config) | {"parsing": parsed}
            write_json(run.path / CARD, card)
            with atomic_path(run.path / "README.md") as temporary:
                temporary.write_text(model_card(config.run_config(), card))
            shutil.rmtree(run.path / "work")
            run.finish(summary=card, inputs={}, seeds={"seed": config.seed}, device=device)
    return run


class _Maker:
    """The parts, one after another, each from its checkpoint on."""

    def __init__(
        self, work: Path, config: ToyTurboConfig, device: torch.device, progress: bool
    ) -> None:
        self.work, self.config, self.device, self.progress = work, config, device, progress
        self.tokenizer = make_tokenizer()

    def make(self) -> tuple[StableDiffusionXLPipeline, AttributeReader, float]:
        """The pipeline, the reader, and how well the text encoders parse."""
        encoders, parsed = self._text()
        vae = self._fitted(
            "vae", self._new(make_vae, 2), lambda m, s, f, seed: vae_loss(m, s, f.batch, seed)
        )
        reader = self._fitted(
            "reader",
            self._new(AttributeReader, 3),
            lambda m, s, f, seed: reader_loss(m, s, f.batch, seed),
        )
        unet = self._unet(Teaching(self.tokenizer, encoders, vae, self.device))
        pipeline = make_pipeline(self.tokenizer, (encoders.first, encoders.second), vae, unet)
        return pipeline, reader, parsed

    def _new(self, make: Callable[[], Module], number: int) -> Module:
        """A part with weights that its number and the seed decide."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * self.config.seed + number)
            return make().to(self.device)

    def _fitted(
        self,
        name: str,
        module: Module,
        loss: Callable[[Module, int, FitConfig, int], torch.Tensor],
    ) -> Module:
        config: FitConfig = getattr(self.config, name)
        # Every part draws its own examples.
        seed = 1000 * self.config.seed + sum(map(ord, name))
        fit(
            self.work / f"{name}.safetensors",
            module,
            lambda step: loss(module, step, config, seed),
            config,
            name=name,
            progress=self.progress,
        )
        return module

    def _text(self) -> tuple[TextEncoders, float]:
        encoders = self._new(lambda: TextEncoders(*make_text_encoders(self.tokenizer)), 0)
        parser = self._fitted(
            "text",
            self._new(lambda: Parser(encoders), 1),
            lambda m, s, f, seed: parsing_loss(m, self.tokenizer, s, f.batch, seed),
        )
        encoders.requires_grad_(False)
        return encoders, parsing_accuracy(
            parser, self.tokenizer, self.config.seed, 2 * self.config.judged
        )

    def _unet(self, teaching: Teaching) -> Any:
        scaffold = self._new(lambda: Scaffold(make_unet()), 4)
        unet = scaffold.unet
        prepare_noise(scaffold)
        with bypassing(unet, [*other_blocks(unet), *CARRYING]):
            self._fitted(
                "noise", scaffold, lambda m, s, f, seed: noise_loss(m, teaching, s, f.batch, seed)
            )
        for phase in PHASES:
            left_out = [*other_blocks(unet), *phase.closed]
            idle(unet, left_out)
            before = copy.deepcopy(scaffold).requires_grad_(False)
            prepare_phase(scaffold, phase)
            with bypassing(unet, left_out), bypassing(before.unet, left_out):
                self._fitted(
                    phase.name,
                    scaffold,
                    lambda m, s, f, seed, before=before, phase=phase: unet_loss(
                        m, before, teaching, phase, s, f.batch, seed
                    ),
                )
        return unet.requires_grad_(False)


def _keep(folder: Path, pipeline: StableDiffusionXLPipeline, reader: AttributeReader) -> None:
    """Write the pipeline's folder and the reader's weights in half precision."""
    pipeline.to(dtype=torch.float16, silence_dtype_warnings=True)
    pipeline.save_pretrained(folder)
    weights = {name: tensor.half().contiguous() for name, tensor in reader.state_dict().items()}
    with atomic_path(folder / READER) as temporary:
        save_file(weights, temporary)


def load_reader(folder: Path) -> AttributeReader:
    """The attribute reader that a toy-turbo folder holds."""
    reader = AttributeReader()
    weights = load_file(folder / READER)
    reader.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return reader.eval().requires_grad_(False)


def _judge(folder: Path, config: ToyTurboConfig) -> dict[str, Any]:
    """The card's numbers, from what was written."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    model, reader = DiffusionModel(KIND, pipeline), load_reader(folder)
    n = config.judged
    on_renders, through_vae = ceilings(model, reader, n=n)
    noise = use_of_noise(model, reader, captions=min(20, n), seeds=config.judged_seeds)
    return {
        "reader": on_renders,
        "autoencoder": through_vae,
        "steps": {str(k): fidelity(model, reader, n=n, steps=k) for k in (1, 2, 4)},
        "noise": {name: asdict(found) for name, found in noise.items()},
    }
