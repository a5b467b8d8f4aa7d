"""The image adapter: where a block's tensors are, how images are drawn, what is left behind."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from probe.adapters import Model
from probe.capture import capturing, site_width
from probe.diffusion import DiffusionModel, DrawConfig, Generated, block_path
from probe.errors import Failure, UserError
from probe.interventions import Channels, Edit, Places, applying, editing
from probe.models import load_image_model, load_language_model, load_model, weights_checksum
from probe.passes import read_passes
from probe.pipelines import is_pipeline
from probe.runs import sha256_file
from probe.sites import Site, expand_sites, parse_site
from probe.toy import tiny_llama, tiny_sdxl

FOUR = tuple(map(parse_site, ("down.2.1", "mid.0", "up.0.0", "up.0.1")))
PUBLISHED = {
    "down.2.1": "down_blocks.2.attentions.1",
    "mid.0": "mid_block.attentions.0",
    "up.0.0": "up_blocks.0.attentions.0",
    "up.0.1": "up_blocks.0.attentions.1",
}
GUIDED = DrawConfig(steps=2, guidance=4.0)
PROMPTS = ["a sloth in a tree", "two red boats"]


@pytest.fixture(scope="module")
def sdxl() -> DiffusionModel:
    return tiny_sdxl()


def hooks(model: DiffusionModel) -> int:
    """How many hooks hang on the U-Net's modules."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.unet.modules()
    )


# ------------------------------------------------------------------------------------ sites


def test_the_blocks_are_those_of_the_published_module_paths(sdxl) -> None:
    for name, path in PUBLISHED.items():
        assert block_path(parse_site(name)) == path
        block, side = sdxl.hook_point(parse_site(f"{name}:output"))
        assert block is sdxl.pipeline.unet.get_submodule(path) and side == "output"
        assert type(block).__name__ == "Transformer2DModel"
    assert list(map(str, sdxl.sites())) == [
        *("down.1.0", "down.1.1", "down.2.0", "down.2.1", "mid.0"),
        *("up.0.0", "up.0.1", "up.0.2", "up.1.0", "up.1.1", "up.1.2"),
    ]


def test_both_adapters_offer_what_hooks_need(sdxl) -> None:
    assert isinstance(sdxl, Model) and isinstance(tiny_llama(), Model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_plus_update_is_output_bit_for_bit(dtype) -> None:
    model = tiny_sdxl()
    model.pipeline.to(dtype)
    own: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for site in model.sites():
        block = model.block(site)

        def keep(_, args, output, name=str(site)) -> None:
            own[name] = (args[0], output[0])

        handles.append(block.register_forward_hook(keep))
    with torch.no_grad(), capturing(model, model.sites()) as seen:
        model.run(PROMPTS, [0, 1])
    for site in model.sites():
        entering, leaving = own.get(str(site), (None, None))
        if entering is None or leaving is None:
            assert site == model.sites()[-1], "the last block is left before it adds its input"
            continue
        h, w = model.grid(site)
        assert entering.shape[2:] == (h, w)
        update = seen[site].transpose(1, 2).unflatten(2, (h, w))
        assert torch.equal(entering + update, leaving)
        torch.testing.assert_close(update, leaving - entering, atol=0.1, rtol=0.02)
    for handle in handles:
        handle.remove()


def test_places_are_numbered_row_by_row(sdxl) -> None:
    site = parse_site("mid.0:output")
    raw: list[Tensor] = []
    handle = sdxl.block(site).register_forward_hook(lambda _, __, out: raw.append(out[0]))
    config = DrawConfig(height=32, width=64)
    with capturing(sdxl, [site], early_exit=False) as seen:
        sdxl.run(["a"], [0], config)
    handle.remove()
    h, w = sdxl.grid(site, config)
    assert (h, w) == (4, 8)
    assert seen[site].shape == (1, 32, 16)
    assert torch.equal(seen[site][0, 2 * w + 5], raw[0][0, :, 2, 5])


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (64, 8)])
def test_a_grid_is_known_before_anything_runs(sdxl, size) -> None:
    config = DrawConfig(height=size[0], width=size[1])
    sites = [parse_site(f"{site}:input") for site in sdxl.sites()]
    found: dict[str, tuple[int, int]] = {}
    handles = [
        sdxl.block(site).register_forward_pre_hook(
            lambda _, args, name=str(site): found.update({name: tuple(args[0].shape[2:])})
        )
        for site in sites
    ]
    sdxl.generate(["a"], [0], config)
    for handle in handles:
        handle.remove()
    assert found == {str(site): sdxl.grid(site, config) for site in sites}


def test_names_read_back_and_globs_stand_for_blocks(sdxl) -> None:
    for name in ("down.2.1", "mid.0:input", "up.0.1:output"):
        assert str(parse_site(name)) == name
    assert str(parse_site("up.0.1:update")) == "up.0.1"
    assert parse_site("down.2.1") == Site(kind="block", path="down.2.1", tensor="update")
    assert [str(s) for s in expand_sites(["up.0.*:input"], sdxl.sites())] == [
        "up.0.0:input",
        "up.0.1:input",
        "up.0.2:input",
    ]
    for wrong in ("down.2", "mid", "mid.0.1", "up.00.1", "down.2.1:gradient", "side.0.0"):
        with pytest.raises(UserError, match="is not known: wanted"):
            parse_site(wrong)


def test_an_unknown_block_is_refused_with_those_there_are(sdxl) -> None:
    for ask in (
        lambda: expand_sites(["up.9.0"], sdxl.sites()),
        lambda: sdxl.hook_point(parse_site("up.9.0")),
        lambda: sdxl.hook_point(parse_site("resid_post.1")),
    ):
        with pytest.raises(UserError, match=r"which has down\.1\.0, down\.1\.1, .*, up\.1\.2"):
            ask()
    with pytest.raises(UserError, match="paths start with one of: vae, text_encoder"):
        sdxl.hook_point(parse_site("module:unett.mid_block"))
    with pytest.raises(UserError, match="a language model"):
        tiny_llama().hook_point(parse_site("mid.0"))


def test_any_module_of_any_part_can_be_read(sdxl) -> None:
    sites = list(
        map(
            parse_site,
            (
                "module:text_encoder.encoder.layers.0",
                "module:unet.mid_block.attentions.0:update",
                "module:vae.decoder.conv_in",
            ),
        )
    )
    with torch.no_grad(), capturing(sdxl, sites, early_exit=False) as seen:
        sdxl.generate(["a"], [0])
    assert [tuple(seen[site].shape) for site in sites] == [(1, 24, 16), (1, 16, 16), (1, 256, 8)]
    assert site_width(sdxl, FOUR[0]) == 16


# ---------------------------------------------------------------------------------- drawing


def test_the_pipeline_is_called_as_published(sdxl, monkeypatch) -> None:
    pipeline = sdxl.pipeline
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    given = {}
    original = type(pipeline).__call__
    names = list(inspect.signature(original).parameters)

    def listening(self, *args, **kwargs):
        given.update(dict(zip(names[1:], args, strict=False)) | kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(pipeline), "__call__", listening)
    sdxl.generate(["a sloth"], [42])
    assert given["num_inference_steps"] == 1 and given["guidance_scale"] == 0.0
    assert pipeline.scheduler.timesteps.tolist() == [999]
    assert "negative_prompt" not in given


def test_images_are_those_of_the_pipeline_itself(sdxl) -> None:
    ours = sdxl.generate([PROMPTS[0]], [7], DrawConfig(steps=2)).images
    theirs = sdxl.pipeline(
        PROMPTS[0],
        num_inference_steps=2,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert ours[0].tolist() == np.asarray(theirs).tolist()


@pytest.mark.parametrize("config", [DrawConfig(), DrawConfig(steps=3), GUIDED])
def test_an_image_drawn_alone_is_that_of_the_batch(sdxl, config) -> None:
    together = sdxl.generate(PROMPTS, [3, 4], config)
    for i, prompt in enumerate(PROMPTS):
        alone = sdxl.generate([prompt], [3 + i], config)
        torch.testing.assert_close(alone.latents[0], together.latents[i], atol=1e-3, rtol=1e-4)
        difference = alone.images[0].int() - together.images[i].int()
        assert difference.abs().max() <= 1
    assert not torch.equal(together.images[0], together.images[1])
    again = sdxl.generate(PROMPTS[:1], [4], config)
    assert not torch.equal(again.images[0], together.images[0]), "the seed decides too"


def test_the_passes_of_a_drawing_know_their_step_and_rows(sdxl) -> None:
    met = []
    handle = sdxl.unet.register_forward_pre_hook(
        lambda _, args: met.append((sdxl.step, sdxl.conditional_rows, len(args[0])))
    )
    sdxl.generate(PROMPTS, [0, 1], DrawConfig(steps=3))
    assert met == [(step, slice(0, 2), 2) for step in range(3)]
    met.clear()
    sdxl.generate(PROMPTS, [0, 1], GUIDED)
    assert met == [(step, slice(2, 4), 4) for step in range(2)]
    handle.remove()


def test_the_conditional_row_reads_the_prompt(sdxl) -> None:
    """The first step's input is noise alone, so its conditional row is a run without guidance."""
    site = FOUR[0]
    plain = read_passes(sdxl, PROMPTS, [5, 6], DrawConfig(steps=2), [site]).values[site]
    guided = read_passes(sdxl, PROMPTS, [5, 6], GUIDED, [site]).values[site]
    torch.testing.assert_close(guided[0], plain[0], atol=1e-4, rtol=1e-4)
    both = read_passes(sdxl, PROMPTS, [5, 6], GUIDED, [site], rows="both").values[site]
    assert torch.equal(both[:, 2:], guided)
    other = read_passes(sdxl, PROMPTS, [5, 6], GUIDED, [site], rows="unconditional").values[site]
    assert torch.equal(both[:, :2], other)
    assert not torch.allclose(other[0], plain[0], atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_step_is_read_and_the_rest_is_left_out(sdxl, steps) -> None:
    config = DrawConfig(steps=steps)
    decoded, passes = [], []
    handles = [
        sdxl.pipeline.vae.decoder.register_forward_pre_hook(lambda *_: decoded.append(1)),
        sdxl.unet.conv_out.register_forward_pre_hook(lambda *_: passes.append(1)),
    ]
    short = read_passes(sdxl, PROMPTS, [0, 1], config, FOUR)
    assert (len(decoded), len(passes)) == (0, steps - 1)
    full = read_passes(sdxl, PROMPTS, [0, 1], config, FOUR, draw=True)
    assert (len(decoded), len(passes)) == (1, 2 * steps - 1)
    for handle in handles:
        handle.remove()
    assert short.drawn is None and full.drawn is not None
    for site in FOUR:
        assert short.values[site].shape == (steps, 2, 16, 16)
        assert torch.equal(short.values[site], full.values[site])
    with torch.no_grad(), capturing(sdxl, FOUR) as seen:
        assert sdxl.run(PROMPTS, [0, 1], config) is None
    assert torch.equal(seen[FOUR[2]], short.values[FOUR[2]][-1])


# ---------------------------------------------------------------------------------- editing


def test_an_edit_that_changes_nothing_leaves_every_bit(sdxl) -> None:
    plain = sdxl.generate(PROMPTS, [0, 1], GUIDED).latents
    for name in ("down.2.1", "mid.0:input", "up.0.1:output"):
        with editing(sdxl, parse_site(name), lambda x: x + 0):
            assert torch.equal(sdxl.generate(PROMPTS, [0, 1], GUIDED).latents, plain), name


def test_a_block_without_its_update_gives_its_input(sdxl) -> None:
    site = FOUR[1]
    ends = [parse_site("mid.0:input"), parse_site("mid.0:output")]
    with editing(sdxl, site, lambda x: 0 * x), capturing(sdxl, [site, *ends]) as seen:
        sdxl.run(["a"], [0])
    assert not seen[site].any()
    assert torch.equal(seen[ends[0]], seen[ends[1]])


def test_an_edit_can_choose_steps_rows_and_places(sdxl) -> None:
    site = FOUR[0]

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        if sdxl.step == 1:
            new[sdxl.conditional_rows, 6] += 1
        return new

    before = read_passes(sdxl, PROMPTS, [0, 1], GUIDED, [site], rows="both").values[site]
    with editing(sdxl, site, change):
        after = read_passes(sdxl, PROMPTS, [0, 1], GUIDED, [site], rows="both").values[site]
    difference = after - before
    wanted = torch.zeros_like(difference)
    wanted[1, 2:, 6] = 1
    torch.testing.assert_close(difference, wanted)


def test_edits_as_data_reach_the_places_they_name(sdxl) -> None:
    site = FOUR[3]
    places = torch.zeros(16)
    places[[1, 4]] = 1
    edit = Edit(
        site=site,
        component=Channels(start=0, stop=16),
        op="add",
        where=Places(mask=places),
        value=torch.full((16,), 2.0),
    )
    before = read_passes(sdxl, ["a"], [0], DrawConfig(), [site]).values[site]
    with applying(sdxl, [edit]):
        after = read_passes(sdxl, ["a"], [0], DrawConfig(), [site]).values[site]
    torch.testing.assert_close(
        after - before, 2.0 * places[None, None, :, None].expand(1, 1, -1, 16)
    )


def test_a_failed_drawing_leaves_no_hook_behind(sdxl) -> None:
    plain = sdxl.generate(["a"], [0]).latents

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    with (
        pytest.raises(RuntimeError, match="no"),
        capturing(sdxl, FOUR),
        editing(sdxl, FOUR[2], fail),
    ):
        sdxl.generate(["a"], [0])
    with pytest.raises(RuntimeError, match="no"), editing(sdxl, FOUR[2], fail):
        read_passes(sdxl, ["a"], [0], DrawConfig(), FOUR[:3])
    assert hooks(sdxl) == 0 and sdxl.drawing is None
    assert torch.equal(sdxl.generate(["a"], [0]).latents, plain)


# --------------------------------------------------------------------- what cannot be drawn


def test_what_cannot_be_drawn_is_refused(sdxl) -> None:
    with pytest.raises(UserError, match="at least 1 step, got 0"):
        DrawConfig(steps=0)
    with pytest.raises(UserError, match=r"1001 steps were asked for .* ask for 1 to 1000"):
        sdxl.generate(["a"], [0], DrawConfig(steps=1001))
    with pytest.raises(UserError, match="height must be a multiple of 8 pixels, got 30"):
        DrawConfig(height=30)
    with pytest.raises(UserError, match="guidance must be 0"):
        DrawConfig(guidance=float("nan"))
    with pytest.raises(UserError, match="1 prompts and 2 seeds"):
        sdxl.generate(["a"], [0, 1])
    with pytest.raises(UserError, match="0 prompts"):
        sdxl.generate([], [])
    for guidance in (0.0, 1.0):
        with pytest.raises(UserError, match="no unconditional row; ask for guidance above 1"):
            read_passes(sdxl, ["a"], [0], DrawConfig(guidance=guidance), FOUR, rows="unconditional")
    with pytest.raises(UserError, match="where once a step was wanted"):
        site = parse_site("module:text_encoder.encoder.layers.0")
        read_passes(sdxl, ["a"], [0], DrawConfig(steps=2), [site])


def test_long_prompts_are_known(sdxl) -> None:
    # 24 tokens with the start and the end: 22 letters.
    assert sdxl.truncated(["a" * 22, "a" * 23, ""]).tolist() == [False, True, False]


# ---------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folder(sdxl, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    sdxl.pipeline.save_pretrained(path)
    return str(path)


def drawn(model: DiffusionModel) -> Generated:
    return model.generate(PROMPTS, [0, 1])


def test_a_saved_pipeline_draws_the_same(sdxl, folder) -> None:
    loaded = load_model(folder, dtype="float32", device="cpu")
    assert isinstance(loaded, DiffusionModel) and loaded.spec == folder
    assert torch.equal(drawn(loaded).images, drawn(sdxl).images)
    weights = Path(folder) / "unet/diffusion_pytorch_model.safetensors"
    assert weights_checksum(folder) == sha256_file(weights)
    half = load_image_model(folder, dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16 and drawn(half).images.shape == (2, 32, 32, 3)


def test_the_twin_has_a_fresh_unet_and_the_same_readers(sdxl, folder) -> None:
    twins = [
        load_image_model(folder, dtype="float32", device="cpu", random_weights=seed)
        for seed in (1, 1, 2)
    ]
    first, same, other = (twin.pipeline.unet.state_dict() for twin in twins)
    weight = "mid_block.attentions.0.proj_out.weight"
    assert torch.equal(first[weight], same[weight])
    assert not torch.equal(first[weight], other[weight])
    assert not torch.equal(first[weight], sdxl.pipeline.unet.state_dict()[weight])
    for part in ("text_encoder", "text_encoder_2", "vae"):
        ours, theirs = twins[0].parts[part].state_dict(), sdxl.parts[part].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_no_sdxl_pipeline_is_refused(folder, tmp_path) -> None:
    with pytest.raises(UserError, match=r"config\.json .* or a model_index\.json"):
        load_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="of class FluxPipeline where StableDiffusionXLPipeline"):
        load_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline"})
    )
    with pytest.raises(Failure, match="does not load as a StableDiffusionXLPipeline"):
        load_model(str(tmp_path), dtype="float32", device="cpu")
    with pytest.raises(UserError, match="is an image model and a language model was wanted"):
        load_language_model(folder)
    with pytest.raises(UserError, match="no image model that is known here"):
        load_image_model("smollm2")


def test_names_that_mean_image_models(folder) -> None:
    assert all(map(is_pipeline, ("sdxl-turbo", "sdxl-base", "toy-turbo", folder)))
    assert not is_pipeline("smollm2")


def test_a_scheduler_of_second_order_is_refused(sdxl) -> None:
    from diffusers import HeunDiscreteScheduler

    other = tiny_sdxl().pipeline
    other.scheduler = HeunDiscreteScheduler.from_config(other.scheduler.config)
    with pytest.raises(UserError, match="HeunDiscreteScheduler, runs the U-Net more than once"):
        DiffusionModel("heun", other)
