"""The block-roles study from end to end on untrained models: its parts, its report, bad input."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from image_tree import ImageTree, make_image_tree
from PIL import Image
from toy_turbo_tree import BLOCKS, ToyTree, make_sae, make_toy_tree
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from analyses import block_roles, report
from analyses.block_roles_clip import load_image_text
from analyses.block_roles_measured import PRESETS, Config, Settings
from analyses.block_roles_pairs import make_pairs
from analyses.block_roles_subjects import find_saes, load_subjects
from analyses.report import read_report
from probe.diffusion import DrawConfig
from probe.errors import UserError
from probe.runs import Run
from probe.sites import parse_site
from probe.toy import clip_byte_tokenizer
from probe.toyturbo.world import FACTORS

TINY = Settings(
    images=20, pairs=2, features=2, transports=0, per_feature=1, scored=3, top=4, doses=(8.0,),
    factors=(0.0,), counts=(3,), neuron_counts=(4,), strengths=(1.0,), steering=(1.0,),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small():
    """The quick preset at the size of a test, and no pictures, which take seconds."""
    with pytest.MonkeyPatch.context() as here:
        here.setitem(PRESETS, "quick", TINY)
        here.setitem(block_roles.BEST_IN_STEPS, "quick", 1)
        here.setattr(report, "CHROMIUM", Path("none"))
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> ToyTree:
    return make_toy_tree(tmp_path_factory.mktemp("roles"))


@pytest.fixture(scope="module")
def config(tree) -> Config:
    return Config(
        saes=tuple(str(tree.saes[block].path) for block in reversed(BLOCKS)),
        twins=(tree.twins[BLOCKS[0]].path.name,),
        sweep=(tree.wide.path.name,),
        device="cpu",
    )


@pytest.fixture(scope="module")
def run(tree, config) -> Run:
    return block_roles.run(config, tree.root)


def cells(root: Path, part: str) -> list[Path]:
    return sorted((root / "tasks").glob(f"roles-{part}-*"))


def test_the_report_has_every_part(run):
    found = read_report(run.path)
    assert found.title == "What the blocks of toy do"
    assert "partly made by its training" in found.text and "none is about SDXL-Turbo" in found.text
    assert "its columns lack them" in found.text, "one of the two blocks has no twin"
    assert all(verdict.claim.startswith("On toy: ") for verdict in found.verdicts)
    claims = " ".join(verdict.claim for verdict in found.verdicts)
    for part in ("composition", "local", "wider", "four steps", "features of their own", "twin"):
        assert part in claims, part
    assert {
        "roles", "prediction", "patching", "ablations", "values_by_block", "values", "locality",
        "pairs_of_colour_and_shape", "pushes_of_features", "top_images", "k_and_width",
        "four_steps",
    } <= set(found.tables)  # fmt: skip
    assert found.tables["roles"]["factor"].tolist() == list(FACTORS)
    assert len(found.tables["k_and_width"]) == 3
    assert len(found.tables["values"]) == 26 and len(found.tables["prediction"]) == 16
    assert {"patching_by_block", "patched_images", "doses_of_features"} <= set(found.figures)
    metrics = json.loads((run.path / "metrics.json").read_text())["numbers"]
    assert metrics["drawn as said/position"] >= 0 and 0 <= metrics[
        "values with a feature of their own"
    ] <= 1  # fmt: skip


def test_what_is_kept_is_not_done_again_and_a_lost_part_comes_out_the_same(tree, config, run):
    done = {path: path.stat().st_mtime_ns for path in tree.root.glob("tasks/*/manifest.json")}
    (lost,) = cells(tree.root, "locality")[:1]
    before = pd.read_parquet(lost / "locality.parquet")
    shutil.rmtree(lost)
    again = block_roles.measure(config, tree.root)
    after = {path: path.stat().st_mtime_ns for path in tree.root.glob("tasks/*/manifest.json")}
    assert set(after) == set(done)
    assert [path.parent for path in done if done[path] != after[path]] == [lost]
    pd.testing.assert_frame_equal(before, pd.read_parquet(lost / "locality.parquet"))
    assert again.blocks == BLOCKS and again.twins == BLOCKS[:1]
    assert block_roles.run(config, tree.root).path == run.path


def test_the_parts_are_counted_before_they_are_measured(tree, config):
    study = block_roles._Study(config, TINY, tree.root, find_saes(config, tree.root), None)
    ticked = []
    study.bar = type("Bar", (), {"update": lambda _: ticked.append(1), "set_postfix_str": None})()
    study.bar.set_postfix_str = lambda _: None
    study.all()
    assert len(ticked) == study.n_parts


def test_a_patched_image_is_that_of_a_plain_hook(tree, config, run):
    """Against the update written in by hand: output = input + the partner's update."""
    model = load_subjects(find_saes(config, tree.root), "cpu")["trained"].model
    pairs, block = make_pairs(TINY.pairs, config.seed), BLOCKS[0]
    module, seen = model.block(parse_site(block)), []

    def draw(prompts, hook):
        handle = module.register_forward_hook(hook)
        try:
            return model.generate(prompts, pairs.seeds, DrawConfig()).images
        finally:
            handle.remove()

    def keep(_, args, out):
        seen.append(out[0] - args[0])

    draw(pairs.partner("background").prompts, keep)
    wanted = draw(pairs.asked.prompts, lambda _, args, out: (args[0] + seen[0], *out[1:]))
    trained = [
        cell
        for cell in cells(tree.root, "causes")
        if json.loads((cell / "config.json").read_text())["model"]["random_weights"] is None
    ]
    kept = pd.read_parquet(trained[0] / "patched.parquet")
    row = kept[(kept["factor"] == "background") & (kept["block"] == block) & (kept["unit"] == 1)]
    image = np.asarray(Image.open(io.BytesIO(next(iter(row["data"])))))
    assert np.abs(image.astype(int) - wanted[1].numpy().astype(int)).max() <= 1
    plain = model.generate(pairs.asked.prompts, pairs.seeds, DrawConfig()).images
    assert not torch.equal(plain, wanted)


def test_nothing_is_changed_by_a_models_own_updates(tree, config):
    from analyses.block_roles_drawing import Change, draw, draw_and_read, draw_each

    subject = load_subjects(find_saes(config, tree.root), "cpu")["trained"]
    asked = make_pairs(3, 5).asked
    images, updates = draw_and_read(subject.model, asked, subject.sites)
    own = [Change(block=block, op="set", value=x) for block, x in updates.items()]
    assert torch.equal(draw(subject.model, asked, own), images)
    shift = torch.full((1, 1, 1), 5.0)
    changes = [Change(block=BLOCKS[0], op="add", value=factor * shift) for factor in (0.0, 1.0)]
    same, other = draw_each(subject.model, asked, changes)
    assert (same.int() - images.int()).abs().max() <= 1 and not torch.equal(other, images)


def test_the_dry_run_counts_what_is_drawn(config):
    said = block_roles.estimate(config)
    drawn = block_roles.images_drawn(config, TINY)
    # Two captions: 7 partners, 7 x 3 patches, 1 + 3 of other noise, 1, and 2 x 2 ablations each.
    assert drawn["patches and ablations"] == 2 * 2 * (7 + 21 + 1 + 4 + 4)
    assert drawn["pushes of features"] == 2 * 26 * (1 + 3)
    assert f"{sum(drawn.values())}: 40 for probes" in said["images drawn"]


# ------------------------------------------------------------------------- a model not toy-turbo


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> ImageTree:
    return make_image_tree(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIPModel of random weights, with its processor."""
    folder, tokenizer = tmp_path_factory.mktemp("clip") / "tiny-clip", clip_byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": 513}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=sizes | heads | text,
                vision_config=sizes | heads | {"image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        )
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_on_another_model_what_needs_factors_is_left_out(other, clip, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a boat number {i} at sea" for i in range(30)))
    config = Config(
        saes=tuple(str(run.path) for run in other.saes.values()), prompts=str(prompts),
        clip=str(clip), device="cpu",
    )  # fmt: skip
    found = read_report(block_roles.run(config, other.root).path)
    assert "This model is not toy-turbo" in found.text
    assert set(found.tables) == {"ablations", "locality", "top_images", "k_and_width", "four_steps"}
    scores = set(found.tables["top_images"]["score"])
    assert scores == {
        "colour distance", "likeness by CLIP", "likeness to the word texture",
        "icon and captions by CLIP",
    }  # fmt: skip
    assert found.verdicts and all(v.claim.startswith("On tiny: ") for v in found.verdicts)
    assert "position" not in found.tables["ablations"]
    assert set(found.tables["k_and_width"]["features"]) == {48}


def test_embeddings_are_the_models_own(clip):
    judge = load_image_text(str(clip))
    images = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    found = judge.images(images)
    pil = [Image.fromarray(image.numpy()) for image in images]
    given = judge.processor(images=pil, text=["texture"], return_tensors="pt", padding=True)
    with torch.no_grad():
        whole = judge.model(**given)
    torch.testing.assert_close(found, whole.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(judge.texts(("texture",)), whole.text_embeds, atol=1e-5, rtol=1e-4)
    assert judge.texts(("a" * 99, "b")).shape == (2, 8), "what is too long is cut"


def test_what_is_no_image_text_model_is_refused(other):
    with pytest.raises(UserError, match="is no image-text model: wanted a folder"):
        load_image_text(other.spec)


# ---------------------------------------------------------------------------------------- bad input


def test_saes_that_do_not_belong_together_are_refused(tree, other, config, tmp_path):
    first, second = (str(tree.saes[block].path) for block in BLOCKS)

    def refused(match: str, **options):
        with pytest.raises(UserError, match=match):
            block_roles.run(replace(config, **options), tree.root)

    refused("no SAE was given", saes=())
    refused("was named where the folder of an SAE was wanted", saes=("nobody",))
    refused("give SAEs of one model", saes=(first, str(other.saes["up.0.0"].path)), twins=())
    refused("are both of down.2.1", saes=(first, str(tree.wide.path)), twins=())
    refused("of the random-weight twin .* give it with --twins", saes=(config.twins[0],), twins=())
    refused("of the trained .* give it with --saes", twins=(second,))
    refused("has no partner: --saes has up.0.1", saes=(second,))
    refused("of which --saes has none", saes=(second,), twins=(), sweep=(first,))
    refused("holds no SAE of", sweep=(str(other.root),))
    refused("pairs must be at least 2", pairs=1)
    x = torch.randn(50, 128)
    entering = make_sae(tmp_path, tree.spec, "down.2.1:input", x, None)
    refused("SAEs of blocks' updates were wanted", saes=(str(entering.path),), twins=())
    language = make_sae(tmp_path, "smollm2", "mid.0", x, None)
    refused("smollm2 is no image model", saes=(str(language.path),), twins=(), sweep=())
    missing = make_sae(tmp_path, tree.spec, "up.7.1", x, None)
    refused("site up.7.1 is not in", saes=(str(missing.path),), twins=(), sweep=())
    twin = make_sae(tmp_path, tree.spec, "up.0.1", x, 9)
    refused("twins of different seeds", twins=(config.twins[0], str(twin.path)))
    assert not list(tree.root.glob("reports/block-roles/*/.report*"))


def test_a_sweeps_folder_gives_those_that_fit(tree, config):
    found = find_saes(replace(config, sweep=(str(tree.root / "saes"),)), tree.root)
    assert set(found.sweep) == {tree.wide.path.name}, "not the study's own, nor the twin's"
    assert set(found.trained) == set(BLOCKS)
