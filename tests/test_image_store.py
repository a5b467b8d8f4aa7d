"""Capture of images to disk: against the pipeline itself, through stops, with what cannot be."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import probe.store_writing
from app.cli import dispatch
from probe.diffusion import DiffusionModel, DrawConfig
from probe.errors import Failure, UserError
from probe.image_prompts import pass_batches, read_prompts
from probe.loader import StoreReader, StreamSource
from probe.passes import common_grid
from probe.pictures import decode, encode, read_picture
from probe.ranks import ALONE
from probe.runs import Run, own_files, verify
from probe.sites import parse_site
from probe.store import ActivationStore
from probe.store_config import ImageStoreConfig, read_store_config
from probe.store_writing import estimate_store, write_store
from probe.toy import tiny_llama, tiny_sdxl

SITES = ("down.2.1", "mid.0:output", "up.0.1:input")
N_PROMPTS = 11


@pytest.fixture(scope="module")
def sdxl() -> DiffusionModel:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(f"  a boat number {i} " for i in range(N_PROMPTS)) + "\n")
    return str(path)


def config_for(prompts: str, **changes) -> ImageStoreConfig:
    values = {
        "model": {"spec": "tiny-sdxl", "random_weights": None, "dtype": "float32"},
        "prompts": prompts,
        "sites": SITES,
        "grid": (4, 4),
        "height": 32,
        "width": 32,
        "images": 9,
        "batch_images": 2,
        "shard_batches": 2,
        "dtype": "float32",
        "seed": 5,
    }
    return ImageStoreConfig(**(values | changes))


def capture(parent: Path, model: DiffusionModel, config: ImageStoreConfig) -> ActivationStore:
    run = Run.create(parent, "tiny", config.run_config())
    return write_store(run, model, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in own_files(folder).items()}


def rows_of(store: ActivationStore, site: str) -> dict[str, Tensor]:
    """All rows of a store with where they are."""
    shards = [store.shard(i, site) for i in range(store.n_shards)]
    found = {
        name: torch.cat([getattr(shard, name) for shard in shards])
        for name in ("values", "doc", "sequence", "position", "token")
    }
    for name in ("image", "step", "y", "x", "conditional"):
        found[name] = torch.cat([getattr(shard.in_images, name) for shard in shards])
    return found


# ------------------------------------------------------------------------------- round trip


def reference(model: DiffusionModel, config: ImageStoreConfig) -> dict[tuple, list[Tensor]]:
    """Update, output and input by image, step, row, y and x: each image drawn alone by diffusers.

    The pipeline is called as its own documentation does, with a hook on each block.
    """
    blocks = {
        "down.2.1": model.pipeline.unet.down_blocks[2].attentions[1],
        "mid.0": model.pipeline.unet.mid_block.attentions[0],
        "up.0.1": model.pipeline.unet.up_blocks[0].attentions[1],
    }
    found: dict[tuple, list[Tensor]] = {}
    texts = [line.strip() for line in Path(config.prompts).read_text().splitlines() if line.strip()]
    for image, text in enumerate(texts[: config.images]):
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in blocks}
        handles = [
            block.register_forward_hook(
                lambda _, args, out, name=name, c=calls: c[name].append((args[0], out[0]))
            )
            for name, block in blocks.items()
        ]
        model.pipeline(
            text,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=torch.Generator().manual_seed(config.seed + image),
        )
        for handle in handles:
            handle.remove()
        for step in range(config.steps):
            (d_in, d_out), (_, m_out), (u_in, _) = (calls[name][step] for name in blocks)
            for row, y, x in itertools.product(range(len(d_in)), range(4), range(4)):
                three = [d_out - d_in, m_out, u_in]
                found[image, step, row, y, x] = [one[row, :, y, x] for one in three]
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 2, "places": 5},
        {"steps": 2, "guidance": 3.0, "rows": "both", "places": 3, "keep_images": 0},
        {"guidance": 3.0, "rows": "unconditional"},
    ],
)
def test_rows_are_those_of_the_pipeline_itself(tmp_path, sdxl, prompts, changes) -> None:
    config = config_for(prompts, **changes)
    store = capture(tmp_path, sdxl, config)
    wanted = reference(sdxl, config)
    n_rows = 2 if config.rows == "both" else 1
    places = config.places or 16
    assert store.n_rows == 9 * config.steps * n_rows * places
    assert store.n_shards == 3
    for i, site in enumerate(SITES):
        rows = rows_of(store, site)
        for r in range(store.n_rows):
            image, step, y, x = (int(rows[name][r]) for name in ("image", "step", "y", "x"))
            conditional = bool(rows["conditional"][r])
            row = int(conditional) if config.draw.guided else 0
            expected = wanted[image, step, row, y, x][i]
            torch.testing.assert_close(rows["values"][r], expected, atol=2e-4, rtol=2e-4)
            assert int(rows["position"][r]) == int(rows["token"][r]) == 4 * y + x
            assert int(rows["doc"][r]) == image
            passes = image * config.steps * n_rows + step * n_rows
            assert int(rows["sequence"][r]) == passes + (int(conditional) if n_rows == 2 else 0)
    assert bool(rows["conditional"].all()) == (config.rows == "conditional")
    assert not verify(store.run)


def test_the_manifest_says_what_a_row_is(tmp_path, sdxl, prompts) -> None:
    store = capture(tmp_path, sdxl, config_for(prompts, guidance=2.0, rows="both", steps=3))
    summary = store.run.summary
    assert summary["grid"] == [4, 4]
    assert summary["passes_of_step"] == ["unconditional", "conditional"]
    assert (summary["n_images"], summary["n_documents"]) == (9, 9)
    assert summary["n_sequences"] == 9 * 3 * 2 and summary["n_rows"] == 9 * 3 * 2 * 16
    assert summary["widths"] == dict.fromkeys(SITES, 16)
    assert store.prompts() == [f"a boat number {i}" for i in range(9)]
    assert store.document_ids()[4] == "prompts.txt:9"


def test_prompts_that_end_first_end_the_store(tmp_path, sdxl, prompts) -> None:
    store = capture(tmp_path, sdxl, config_for(prompts, images=10**6))
    assert store.run.summary["n_images"] == N_PROMPTS == len(store.prompts())


def test_places_are_drawn_anew_for_each_image_and_step(prompts) -> None:
    config = config_for(prompts, steps=2, guidance=2.0, rows="both", places=4)
    keep = torch.cat([batch.keep for batch in pass_batches(config)]).unflatten(0, (9, 2, 2))
    assert (keep.sum(-1) == 4).all()
    assert torch.equal(keep[:, :, 0], keep[:, :, 1]), "both rows of guidance keep the same places"
    assert len({tuple(one.tolist()) for one in keep[:, :, 0].flatten(0, 1)}) > 14
    later = torch.cat([batch.keep for batch in pass_batches(config, 6 * 4)])
    assert torch.equal(later, keep[6:].flatten(0, 2)), "the same wherever the reading starts"
    other = config_for(prompts, steps=2, places=4, images=3, batch_images=3)
    (batch,) = pass_batches(other)
    assert torch.equal(batch.keep, keep[:3, :, 0].flatten(0, 1)), "and of whatever else is kept"


# ----------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_capture_ends_with_the_same_bytes(tmp_path, sdxl, prompts, monkeypatch, stop):
    config = config_for(prompts, steps=2, places=7)
    whole = contents(capture(tmp_path / "whole", sdxl, config).run.path)
    plain, calls = probe.store_writing.capture_rows, []

    def stopping(*arguments):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(probe.store_writing, "capture_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        capture(tmp_path / "stopped", sdxl, config)
    monkeypatch.setattr(probe.store_writing, "capture_rows", plain)
    assert contents(capture(tmp_path / "stopped", sdxl, config).run.path) == whole


# --------------------------------------------------------------------------------- pictures


def test_pictures_are_kept_exactly_and_can_be_drawn_again(tmp_path, sdxl, prompts) -> None:
    config = config_for(prompts, keep_images=5)
    store = capture(tmp_path, sdxl, config)
    assert store.run.summary["kept_images"] == 5
    for image in range(5):
        kept = read_picture(store.run.path, image)
        assert (kept.image, kept.doc, kept.seed) == (image, image, 5 + image)
        assert (kept.prompt, kept.format) == (f"a boat number {image}", "png")
        pixels = decode(kept.data)
        assert pixels.shape == (kept.height, kept.width, 3) == (32, 32, 3)
        again = sdxl.generate([kept.prompt], [kept.seed], config.draw).images[0]
        assert (again.int() - pixels.int()).abs().max() <= 1  # alone, not in its batch
    with pytest.raises(UserError, match="has not kept image 5; draw it again"):
        read_picture(store.run.path, 5)


def test_large_pictures_are_jpegs(tmp_path) -> None:
    y, x = torch.meshgrid(torch.arange(136), torch.arange(64), indexing="ij")
    pixels = torch.stack([y, x, (y + x) // 2], dim=-1).to(torch.uint8)
    kind, data = encode(pixels)
    assert kind == "jpeg" and data[:2] == b"\xff\xd8"
    assert (decode(data).int() - pixels.int()).abs().max() < 12
    kind, data = encode(pixels[:128])
    assert kind == "png" and torch.equal(decode(data), pixels[:128])


# --------------------------------------------------------------------------------- estimate


def test_the_published_pipeline_would_take_16_terabytes() -> None:
    """30,000 batches of 50 prompts, 16 x 16 places, 4 blocks of 1280 channels in fp32."""
    blocks = ("down.2.1", "mid.0", "up.0.0", "up.0.1")
    both = (*blocks, *(f"{block}:output" for block in blocks))
    sizes = {
        len(sites): estimate_store(
            ImageStoreConfig(
                model={}, prompts="laion.parquet", sites=sites, images=30_000 * 50, batch_images=50,
                grid=(16, 16), height=512, width=512, dtype="float32", keep_images=0,
            ),
            dict.fromkeys(sites, 1280),
        ).disk_bytes
        for sites in (blocks, both)
    }  # fmt: skip
    values = 30_000 * 50 * 256 * 1280 * 4 * 4
    assert values == 7_864_320_000_000  # 7.86 TB of updates
    assert sizes[8] == pytest.approx(2 * values, rel=1e-2)  # 15.7 TB: updates and outputs
    assert sizes[4] == pytest.approx(values, rel=1e-2)


@pytest.mark.parametrize(
    "changes", [{}, {"steps": 2, "guidance": 2.0, "rows": "both", "places": 5}]
)
def test_the_estimate_bounds_the_real_size(tmp_path, sdxl, prompts, changes) -> None:
    config = config_for(prompts, **changes)
    store = capture(tmp_path, sdxl, config)
    estimate = estimate_store(config, store.run.summary["widths"], picture_bytes=3000)
    parts = ("down.2.1", "mid.0_output", "up.0.1_input", "rows", "images", "statistics")
    files = store.run.manifest["files"]
    real = sum(v["bytes"] for name, v in files.items() if name.startswith(parts))
    assert estimate.rows == store.n_rows and estimate.shards == store.n_shards
    assert 0.5 * estimate.disk_bytes < real < estimate.disk_bytes


# ---------------------------------------------------------------------------------- reading


def test_batches_for_training_come_from_stores_and_streams_alike(tmp_path, sdxl, prompts) -> None:
    config = config_for(prompts)
    store = capture(tmp_path, sdxl, config)
    rows = store.n_rows
    reader = StoreReader(store, "down.2.1", rows, seed=0)
    site = parse_site("down.2.1")
    read = functools.partial(pass_batches, config)
    stream = StreamSource(sdxl, site, read, rows, buffer_rows=rows, max_norm=0.0, ranks=ALONE)
    both = [next(source.batches(0)) for source in (reader, stream)]
    ordered = [one[one[:, 0].argsort()] for one in both]
    torch.testing.assert_close(ordered[0], ordered[1])


# --------------------------------------------------------------------- what cannot be captured


def test_not_a_number_is_placed(tmp_path, prompts) -> None:
    broken = tiny_sdxl()
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\naz\n")
    letter = broken.pipeline.tokenizer.convert_tokens_to_ids("z</w>")
    with torch.no_grad():
        broken.pipeline.text_encoder.get_input_embeddings().weight[letter] = torch.nan
    with pytest.raises(Failure) as caught:
        capture(tmp_path, broken, config_for(str(path), steps=2))
    assert str(caught.value) == (
        "site down.2.1 gave NaN or infinity at image 2 (prompt 'az'), step 0, conditional row, "
        "y 0, x 0; run the model in float32, or leave out that prompt."
    )


def test_cut_prompts_are_counted_and_said(tmp_path, sdxl, caplog) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ["a" * 22, "b" * 23, "c", "d" * 99]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    store = capture(tmp_path, sdxl, config_for(str(path)))
    assert store.run.summary["truncated_prompts"] == 2
    assert "2 of 4 prompts are longer than the 24 tokens that the model reads" in caplog.text


def test_empty_and_missing_prompts(tmp_path) -> None:
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n")
    with pytest.raises(UserError, match="has no prompt in it"):
        read_prompts(str(blank), 0)
    (tmp_path / "blank.jsonl").write_text("")
    with pytest.raises(UserError, match="has no text in it"):
        read_prompts(str(tmp_path / "blank.jsonl"), 0)
    with pytest.raises(UserError, match="is not there"):
        read_prompts(str(tmp_path / "none.txt"), 0)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_prompts(str(latin), 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": 0}, "images must be at least 1"),
        ({"steps": 0}, "at least 1 step"),
        ({"rows": "both"}, "guidance is 0, so there is no unconditional row"),
        ({"rows": "unconditional", "guidance": 1.0}, "no unconditional row"),
        ({"places": 17}, "from 0 .all. to the 16 of a feature map of 4 x 4, got 17"),
        ({"keep_images": -1}, "keep_images must be at least 0"),
        ({"sites": ("mid.0", "mid.0")}, "each once"),
        ({"seed": -1}, "seed must be from 0"),
        ({"height": 20}, "multiple of 8"),
        ({"grid": (256, 256)}, "draw smaller images or choose a deeper site"),
    ],
)
def test_a_config_refuses_nonsense(change, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        config_for("prompts.txt", **change)


def test_a_config_reads_back(prompts) -> None:
    config = config_for(prompts, guidance=2.0, rows="both")
    written = json.loads(json.dumps(config.run_config()))
    assert read_store_config(written) == config
    with pytest.raises(UserError, match="is not one that this version reads"):
        read_store_config(written | {"novelty": 1})


def test_sites_of_different_grids_are_captured_apart(sdxl) -> None:
    sites = list(map(parse_site, ("down.1.0", "mid.0")))
    with pytest.raises(UserError, match=r"down\.1\.0 8 x 8, mid\.0 4 x 4; capture those of one"):
        common_grid(sdxl, sites, DrawConfig())
    neurons = parse_site("module:unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0")
    resnet = parse_site("module:unet.up_blocks.0.resnets.0")
    assert common_grid(sdxl, [neurons, resnet, sites[1]], DrawConfig()) == (4, 4)
    with pytest.raises(UserError, match="where a feature map"):
        sdxl.grid(parse_site("module:unet.time_embedding"))


def test_neurons_inside_a_block_are_rows_too(tmp_path, sdxl, prompts) -> None:
    site = "module:unet.mid_block.attentions.0.transformer_blocks.1.ff.net.0"
    store = capture(tmp_path, sdxl, config_for(prompts, sites=(site, "mid.0"), images=2))
    assert store.d(site) == 64 and store.n_rows == 32


def test_text_has_no_prompts(tmp_path) -> None:
    from test_store import config_for as text_config
    from test_store import write_corpus

    config = text_config(write_corpus(tmp_path / "corpus.jsonl"), tokens=64)
    store = write_store(
        Run.create(tmp_path, "t", config.run_config()), tiny_llama(0), progress=False
    )
    assert store.shard(0, store.sites[0]).in_images is None
    with pytest.raises(UserError, match="is a store of text, which has no prompts"):
        store.prompts()


# ----------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(sdxl, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    sdxl.pipeline.save_pretrained(path)
    return str(path)


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    status = dispatch(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_from_prompts_to_a_dictionary(tmp_path, folder, prompts, capsys) -> None:
    root = ("--root", str(tmp_path), "--device", "cpu")
    status, out, err = said(
        capsys, "capture", folder, prompts, "--sites", "down.2.1,mid.0", "up.0.0:input",
        "--images", "10", "--seed", "3", "--keep-images", "2", "--dtype", "float32", *root,
    )  # fmt: skip
    assert status == 0, err
    store = ActivationStore.open(Path(out.strip()))
    assert store.sites == ["down.2.1", "mid.0", "up.0.0:input"] and store.n_rows == 160
    assert store.run.path.name.startswith("tiny-prompts-")
    assert len(store.run.manifest["inputs"]["model"]) == 64
    small = ("--d-sae", "32", "--k", "4", "--steps", "12", "--batch-size", "32")
    status, out, err = said(
        capsys, "train", str(store.run.path), "--site", "down.2.1", *small, *root
    )
    assert status == 0, err
    sae = Run.open(Path(out.strip()))
    assert sae.config["site"] == "down.2.1" and sae.complete
    cfg = json.loads((sae.path / "cfg.json").read_text())
    assert cfg["d_in"] == 16 and cfg["metadata"]["hook_name"] == "down.2.1"
    assert cfg["metadata"]["exclude_special_tokens"] is False
    status, out, err = said(
        capsys, "train", folder, "--corpus", prompts, "--site", "mid.0", "--dtype", "float32",
        "--buffer-rows", "64", *small, *root,
    )  # fmt: skip
    assert status == 0, err
    source = Run.open(Path(out.strip())).config["source"]
    assert source["context"] == 16 and source["draw"]["steps"] == 1


def test_a_dry_run_says_what_it_would_take(tmp_path, folder, prompts, capsys) -> None:
    status, out, err = said(
        capsys, "capture", folder, prompts, "--images", "10", "--places", "3", "--steps", "2",
        "--guidance", "2", "--rows", "both", "--size", "32", "64", "--dry-run",
        "--root", str(tmp_path), "--device", "cpu",
    )  # fmt: skip
    assert status == 0 and out == ""
    flat = " ".join(err.split())
    assert "down.2.1 [120, 16]" in flat and "up.0.1 [120, 16]" in flat
    assert "10 images of 32 x 64 pixels, 40 passes, 3 of 4 x 8 places each" in flat
    assert "from one batch" in flat and list(tmp_path.iterdir()) == []


def test_options_of_the_other_kind_are_refused(tmp_path, folder, prompts, capsys) -> None:
    mistakes = {
        ("capture", folder, prompts, "--tokens", "5", "--max-norm", "0"): (
            "is an image model, which does not take --tokens, --max-norm"
        ),
        ("capture", "smollm2", "builtin", "--images", "5", "--steps", "2"): (
            "is a language model, which does not take --images, --steps"
        ),
        ("capture", folder, prompts, "--sites", "up.7.0"): "which has down.1.0, down.1.1",
        ("capture", folder, prompts, "--sites", "resid_post.1"): "is not in this model",
        ("capture", folder, prompts, "--sites", "down.1.0,mid.0"): "one grid at a time",
        ("capture", folder, prompts, "--steps", "0"): "at least 1 step, got 0",
        ("capture", folder, prompts, "--steps", "1001"): "ask for 1 to 1000",
        ("capture", folder, prompts, "--rows", "both"): "no unconditional row",
        ("capture", folder, prompts, "--size", "30"): "multiple of 8",
        ("capture", folder, prompts, "--size", "1", "2", "3"): "HEIGHT or HEIGHT WIDTH",
        ("capture", folder, "nothing.txt"): "is not there",
        ("capture", str(tmp_path), prompts): "holds no model",
        ("evaluate", "x"): "is no folder of kind",
    }
    for arguments, sentence in mistakes.items():
        status, out, err = said(capsys, *arguments, "--root", str(tmp_path / "root"))
        assert (status, out) == (2, ""), (arguments, err)
        assert sentence in err and "Traceback" not in err, (arguments, err)
    assert not (tmp_path / "root").exists()


def test_a_twin_is_named_and_seeded(tmp_path, prompts) -> None:
    twin = tiny_sdxl(1)
    config = config_for(
        prompts,
        model={"spec": "tiny-sdxl", "random_weights": 1, "dtype": "float32"},
        sites=("mid.0",),
        images=1,
    )
    twin.spec, twin.random_weights = "toy-turbo-not-there", 1
    run = Run.create(tmp_path, "twin", config.run_config())
    store = write_store(run, twin, progress=False)
    assert store.run.manifest["seeds"] == {"images": 5, "random_weights": 1}


def test_captions_of_the_built_in_world(tmp_path, sdxl) -> None:
    prompts = [one.text for one in itertools.islice(read_prompts("builtin", 5), 3)]
    store = capture(tmp_path, sdxl, config_for("builtin", images=3))
    assert store.prompts() == prompts and len(set(prompts)) == 3
