"""How toy-turbo is trained: exact resume, the formula of one step, the phases; a tiny one made."""

import json

import pytest
import torch
from torch import nn

from probe.diffusion import DiffusionModel, DrawConfig
from probe.errors import Failure
from probe.models import load_model
from probe.toyturbo import making
from probe.toyturbo.briefs import describe, draw_briefs
from probe.toyturbo.evaluation import first_noise
from probe.toyturbo.fitting import FitConfig, fit, seeded
from probe.toyturbo.making import ToyTurboConfig, load_reader, make_toy_turbo
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
from probe.toyturbo.text_training import Parser, TextEncoders, parsing_accuracy, tokenize
from probe.toyturbo.unet_training import (
    PAINTING,
    PHASES,
    Drawn,
    Read,
    Scaffold,
    Teaching,
    bypassing,
    distance,
    draw_examples,
    predicted_latents,
    prepare_phase,
    sigma_of,
)
from probe.toyturbo.world import FACTORS


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    encoders = TextEncoders(*make_text_encoders(tokenizer)).eval()
    return tokenizer, encoders, make_vae().eval(), make_unet().eval()


class Stopped(Exception):
    pass


def test_a_stopped_fit_goes_on_to_the_same_weights(tmp_path):
    config = FitConfig(steps=9, batch=4, lr=1e-2, ema=0.5, save_every=2)

    def run(path, stop_at=None):
        torch.manual_seed(1)
        # The second layer's output is not used: a parameter that never gets a gradient.
        module = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})

        def loss(step):
            if step == stop_at:
                raise Stopped
            x = torch.randn(config.batch, 3, generator=seeded(5, step))
            return (module["used"](x) - x.sum(1, keepdim=True)).square().mean()

        fit(path, module, loss, config, name="line", progress=False)
        return module.state_dict()

    whole = run(tmp_path / "whole.safetensors")
    with pytest.raises(Stopped):
        run(tmp_path / "parts.safetensors", stop_at=5)
    resumed = run(tmp_path / "parts.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    path, module = tmp_path / "fit.safetensors", nn.Linear(1, 1)
    config = FitConfig(steps=41, batch=1, lr=1e-3, save_every=10)

    def loss(step):
        return module(torch.ones(1)).sum() * (float("nan") if step == 40 else 1.0)

    with pytest.raises(Failure, match=r"not finite at step 40; the checkpoint before it is kept"):
        fit(path, module, loss, config, name="line", progress=False)
    assert path.is_file()
    with pytest.raises(Failure, match="checkpoint of other parameters"):
        fit(path, nn.Sequential(nn.Linear(1, 1)), loss, config, name="other", progress=False)


@torch.no_grad()
def test_one_step_of_the_pipeline_is_the_training_formula(parts):
    tokenizer, encoders, vae, unet = parts
    model = DiffusionModel(
        "toy", make_pipeline(tokenizer, (encoders.first, encoders.second), vae, unet)
    )
    captions, seeds = describe(draw_briefs(3, seeded(8), gaps=0.5)), [5, 6, 7]
    drawn = model.generate(captions, seeds, DrawConfig())
    timesteps = torch.full((3,), 999)
    read = Read(*encoders(tokenize(tokenizer, captions)))
    expected = predicted_latents(
        unet,
        Drawn(
            noisy=first_noise(seeds) * sigma_of(timesteps),
            latents=torch.zeros(3, 4, 32, 32),
            timesteps=timesteps,
            weight=torch.ones(3, 1, 32, 32),
            scores=torch.zeros(3, 32, 8, 8),
            said=read,
            meant=read,
        ),
        read,
    )
    assert torch.allclose(drawn.latents, expected, atol=2e-5)


@torch.no_grad()
def test_idle_blocks_are_the_identity_that_training_leaves_out(parts):
    *_, unet = parts
    unet = type(unet).from_config(unet.config)
    others = other_blocks(unet)
    assert len(others) == 7 and not set(others) & set(CARRYING)
    idle(unet, others)
    inputs = (torch.randn(2, 4, 32, 32), torch.tensor([999, 499]), torch.randn(2, 8, 160))
    more = {"text_embeds": torch.randn(2, 64), "time_ids": torch.ones(2, 6)}
    whole = unet(*inputs, added_cond_kwargs=more).sample
    with bypassing(unet, others):
        left_out = unet(*inputs, added_cond_kwargs=more).sample
    assert torch.allclose(whole, left_out, atol=1e-5)
    assert torch.allclose(whole, unet(*inputs, added_cond_kwargs=more).sample)


def test_phases_train_what_they_say(parts):
    *_, unet = parts
    scaffold = Scaffold(type(unet).from_config(unet.config))

    def trained(phase):
        prepare_phase(scaffold, phase)
        return {name for name, p in scaffold.unet.named_parameters() if p.requires_grad}

    layout, shape, texture, gaps, joint = map(trained, PHASES)
    up = {"up_blocks.0.attentions.0.proj_out.weight", "up_blocks.0.attentions.1.proj_out.weight"}
    assert "mid_block.attentions.0.proj_out.weight" in layout and not layout & up
    assert shape & up == {"up_blocks.0.attentions.0.proj_out.weight"}
    assert texture & up == {"up_blocks.0.attentions.1.proj_out.weight"}
    assert not any(name.startswith(("down_blocks", "mid_block")) for name in shape | texture)
    assert gaps > up and not any(name.startswith(PAINTING) for name in gaps)
    assert joint >= layout | shape | texture | gaps
    assert not any(name.startswith("up_blocks.0.attentions.2") for name in joint)


@torch.no_grad()
def test_examples_start_from_noise_alone_or_from_a_noisy_scene(parts):
    tokenizer, encoders, vae, _ = parts
    teaching = Teaching(tokenizer, encoders, vae, torch.device("cpu"))
    drawn = draw_examples(teaching, PHASES[-1], 64, seeded(9))
    same = (drawn.said.context == drawn.meant.context).flatten(1).all(1)
    assert 64 * 0.2 < int((~same).sum()) < 64, "those with gaps mean more than they say"
    sigma = sigma_of(drawn.timesteps)
    first = drawn.timesteps == 999
    assert 0 < int((~first).sum()) < 32
    for rows, scene in ((first, 0.0), (~first, 1.0)):
        noise = (drawn.noisy - scene * drawn.latents)[rows] / sigma[rows]
        assert float(noise.mean()) == pytest.approx(0, abs=0.02)
        assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(drawn.weight.aminmax().min, torch.tensor(1.0))


def test_distance_counts_each_channel_in_its_own_size():
    meant = torch.stack([torch.arange(8.0), 100 * torch.arange(8.0)]).reshape(1, 2, 2, 4)
    # The sample variance of 0..7 is 6; half of the channels are off by one, or by a hundred.
    for off in ([1.0, 0.0], [0.0, 100.0]):
        said = meant + torch.tensor(off)[:, None, None]
        assert float(distance(said, meant)) == pytest.approx((0.5 / 6 + 1e-4) ** 0.5)
    both = torch.cat([meant, meant])
    said = both.clone()
    said[1] += torch.tensor([1.0, 100.0])[:, None, None]
    # The variance of 0..7 twice is 84 / 15; one image of two is off.
    wanted = (1e-2 + (15 / 84 + 1e-4) ** 0.5) / 2
    assert float(distance(said, both)) == pytest.approx(wanted)


@torch.no_grad()
def test_a_pass_that_need_not_paint_stops(parts):
    tokenizer, encoders, vae, unet = parts
    teaching = Teaching(tokenizer, encoders, vae, torch.device("cpu"))
    drawn = draw_examples(teaching, PHASES[-1], 2, seeded(3))
    scaffold = Scaffold(unet)
    whole = scaffold(drawn, drawn.said)
    assert whole.latents is not None and torch.equal(
        whole.latents, predicted_latents(unet, drawn, drawn.said)
    )
    assert len(whole.blocks) == 4
    for until, n_blocks in (("mid_block", 2), ("up_blocks.0.attentions.1", 4)):
        stopped = scaffold(drawn, drawn.said, until=until)
        assert stopped.latents is None and torch.equal(stopped.scores, whole.scores)
        assert len(stopped.blocks) == n_blocks
        assert all(map(torch.equal, stopped.blocks, whole.blocks))
    assert not any(module._forward_hooks for module in unet.modules())


def test_a_parser_that_knows_nothing_scores_so(parts):
    tokenizer, encoders, *_ = parts
    assert parsing_accuracy(Parser(encoders), tokenizer, seed=0, n=100) < 0.5


TINY = FitConfig(steps=1, batch=2, lr=1e-4, save_every=1)
CONFIG = ToyTurboConfig(
    text=TINY,
    vae=TINY,
    reader=TINY,
    noise=TINY,
    layout=TINY,
    shape=TINY,
    texture=TINY,
    gaps=TINY,
    joint=TINY,
    judged=4,
    judged_seeds=2,
)


def test_making_is_resumed_and_leaves_a_pipeline_that_loads(tmp_path, monkeypatch):
    def killed(*_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(making, "_judge", killed)
        with pytest.raises(Stopped):
            make_toy_turbo(tmp_path / "a", CONFIG, progress=False)
    first = make_toy_turbo(tmp_path / "a", CONFIG, progress=False)
    second = make_toy_turbo(tmp_path / "b", CONFIG, progress=False)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (first.path / weights).read_bytes() == (second.path / weights).read_bytes()
    assert first.complete and not (first.path / "work").exists()
    card = (first.path / "README.md").read_text()
    assert "no substitute for\nSDXL-Turbo" in card and "partly made by how it was trained" in card
    numbers = json.loads((first.path / "card.json").read_text())
    assert set(numbers["steps"]) == {"1", "2", "4"} and set(numbers["noise"]) == set(FACTORS)
    model = load_model(str(first.path), dtype="float32", device="cpu")
    assert isinstance(model, DiffusionModel)
    assert model.generate(["a disc"], [0]).images.shape == (1, 64, 64, 3)
    assert load_reader(first.path)(torch.zeros(1, 3, 64, 64)).present.shape == (1, 4)
