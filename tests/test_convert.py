"""`lorgnette convert` on a real tiny store, SAE and index, and what it writes for others."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_tree import D_SAE, SITE, K, Tree, make_tree
from peer_files import (
    rows_for,
    write_saelens,
    write_sdxl_unbox,
    write_sparsify,
    write_top_afa,
)
from safetensors.numpy import load_file

from app.commands import convert, evaluate, index
from app.commands.options import Common
from probe.errors import Failure, UserError
from probe.loader import StoreReader
from probe.runs import Run, verify
from probe.store import ActivationStore
from saes.activations import TopAfa, TopK
from saes.evaluation import EvaluateConfig
from saes.feature_schema import IndexConfig
from saes.features import FeatureIndex
from saes.folder import load_sae, sae_metadata
from saes.interop.neuronpedia import NeuronpediaOptions
from saes.interop.reading import read_peer
from saes.recipe_parts import Unit
from saes.recipe_saes import feature_size
from saes.scales import SCALES

WIDTH = 32


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return make_tree(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def store(tree: Tree) -> ActivationStore:
    (folder,) = (tree.root / "activations").iterdir()
    return ActivationStore.open(folder)


# --------------------------------------------------------------------------------- a folder of ours


def test_a_peer_tied_to_a_store_can_be_evaluated_and_indexed(
    tree: Tree, store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    formula = write_sparsify(tmp_path / "layers.1", d=WIDTH, L=80, k=5)
    common = Common(root=tmp_path / "root")
    shutil.copytree(tree.root / "activations", common.root / "activations")
    link = common.root / "activations" / store.run.path.name
    command = convert.Command(source=tmp_path / "layers.1", store=link, common=common)
    path = convert.run(command)
    assert path is not None and path.parent == common.root / "saes"
    said = capsys.readouterr().err
    assert "FVU" in said and "it is tied to" not in said
    run = Run.open(path)
    assert run.complete and verify(run) == []
    assert run.config["site"] == SITE and run.config["source"]["store"] == store.run.path.name
    assert run.config["source"]["format"] == "sparsify"
    metadata = sae_metadata(path)
    assert metadata["converted_from"] == {"format": "sparsify", "name": "layers.1"}
    sae = load_sae(path)
    x = rows_for(2, WIDTH)
    codes, _ = formula(x)
    found = sae(torch.from_numpy(x)).codes.dense(80).numpy()
    np.testing.assert_allclose(found, codes, atol=1e-5 * codes.max())
    rows = StoreReader(store, SITE, batch_size=1).sample(4096)
    l0 = float((sae.encode(rows).values > 0).sum(1).double().mean())
    assert run.summary["l0"] == pytest.approx(l0)
    recon = formula(rows.numpy())[1]
    errors = ((rows.numpy() - recon) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    assert run.summary["fvu"] == pytest.approx(float(errors), rel=1e-3)
    assert convert.run(command) == path, "the same question finds the same answer"
    few = EvaluateConfig(n_rows=256, n_ce_tokens=128, n_fit_rows=512)
    measured = evaluate.run(
        evaluate.Command(sae=path, evaluate=few, baselines=False, device="cpu", common=common)
    )
    assert measured is not None and Run.open(measured).complete
    found = index.run(
        index.Command(sae=path, index=IndexConfig(top=3), device="cpu", common=common)
    )
    assert found is not None and FeatureIndex.open(found).n_features == 80


def test_without_a_store_it_is_converted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_saelens(tmp_path / "peer", "jumprelu")
    command = convert.Command(source=tmp_path / "peer", common=Common(root=tmp_path / "root"))
    path = convert.run(command)
    assert path is not None
    said = capsys.readouterr().err
    assert "no store is linked" in said and "nothing was measured" in said
    config = Run.open(path).config
    assert config["site"] == "resid_pre.8" and config["model"]["spec"] == "gpt2-small"
    assert path.name.startswith("gpt2-small-resid_pre.8-jump_relu")
    load_sae(path)
    assert sae_metadata(path)["golden_rows"] == "made"


def test_dry_run_writes_nothing_and_says_everything(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_saelens(
        tmp_path / "peer", "gated", d=WIDTH, options={"apply_b_dec_to_input": False}, unit=False
    )
    before = sorted(tmp_path.rglob("*"))
    common = Common(root=tmp_path / "root", dry_run=True)
    (stored,) = (tree.root / "activations").iterdir()
    for to in ("lorgnette", "saelens", "delphi"):
        command = convert.Command(
            source=tmp_path / "peer", to=to, store=stored, site=SITE, common=common
        )
        assert convert.run(command) is None
        said = capsys.readouterr().err
        assert "would write" in said and "folded into its bias" in said and "kept so" in said
    with pytest.raises(UserError, match="gate"):
        convert.run(
            convert.Command(
                source=tmp_path / "peer", to="sparsify", store=stored, site=SITE, common=common
            )
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_does_not_fit_together_is_refused(tree: Tree, tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.1")
    (stored,) = (tree.root / "activations").iterdir()
    common = Common(root=tmp_path / "root")

    def run(**options: object) -> None:
        convert.run(convert.Command(source=tmp_path / "layers.1", common=common, **options))  # type: ignore[arg-type]

    with pytest.raises(UserError, match="width 7 and site"):
        run(store=stored)
    with pytest.raises(UserError, match="holds no site"):
        run(store=stored, site="resid_post.0")
    with pytest.raises(UserError, match="without slashes"):
        run(name="../elsewhere")
    with pytest.raises(UserError, match="found by its name"):
        run(out=tmp_path / "out")
    with pytest.raises(UserError, match="name one with --store"):
        run(to="delphi")
    with pytest.raises(UserError, match="no complete index"):
        run(to="neuronpedia")
    with pytest.raises(UserError, match="--rows must be"):
        run(rows=0)
    with pytest.raises(UserError, match="kind 'sae'"):
        convert.run(convert.Command(source=tmp_path / "nowhere", common=common))
    with pytest.raises(UserError, match="kind 'activations'"):
        convert.run(convert.Command(source=stored, common=common))
    with pytest.raises(Failure, match="still in training"):
        convert.run(convert.Command(source=tree.unfinished.path, common=common))


# ------------------------------------------------------------------------------ weights for others


def test_our_sae_goes_out_and_comes_back(tree: Tree, tmp_path: Path) -> None:
    sae = load_sae(tree.sae.path)
    for to in ("saelens", "sparsify", "sdxl-unbox"):
        command = convert.Command(
            source=tree.sae.path, to=to, out=tmp_path / to, common=Common(root=tree.root)
        )
        assert convert.run(command) == tmp_path / to
        again = read_peer(tmp_path / to)
        assert again.format == to and again.sae.config == sae.config
        assert again.metadata["site"] == SITE
        for name, tensor in sae.tensors().items():
            assert torch.equal(again.sae.tensors()[name], tensor)


def test_scales_of_the_brush_are_those_of_the_index(tree: Tree, tmp_path: Path) -> None:
    command = convert.Command(
        source=tree.sae.path, to="sdxl-unbox", out=tmp_path / "s", common=Common(root=tree.root)
    )
    convert.run(command)
    (found,) = tree.sae.path.glob("index-*")
    numbers = FeatureIndex.open(found).numbers()
    mean = torch.load(tmp_path / "s" / "mean.pt", weights_only=True).numpy()
    np.testing.assert_allclose(mean, numbers["mean"].fillna(0).to_numpy(), rtol=1e-6)


def test_scales_that_came_with_an_sae_are_kept_and_measure_strengths(tmp_path: Path) -> None:
    folder = tmp_path / "unet.mid_block.attentions.0_k4_hidden29_auxk256_bs4096_lr0.0001" / "final"
    folder.mkdir(parents=True)
    write_sdxl_unbox(folder)
    common = Common(root=tmp_path / "artifacts")
    ours = convert.run(convert.Command(source=folder, common=common))
    assert ours is not None
    run = Run.open(ours)
    assert run.config["site"] == "mid.0" and SCALES in run.manifest["files"]
    theirs = {unit: torch.load(folder / f"{name}.pt") for unit, name in BRUSH}
    for unit, _ in BRUSH:
        assert feature_size(run, 3, unit) == float(theirs[unit][3])
    out = convert.run(
        convert.Command(source=ours, to="sdxl-unbox", out=tmp_path / "out", common=common)
    )
    assert out is not None
    for unit, name in BRUSH:
        assert torch.equal(torch.load(out / f"{name}.pt"), theirs[unit])
    with pytest.raises(UserError, match="has no feature index"):
        feature_size(run, 3, "max")
    twice = read_peer(folder, unit_norm=True)
    norms = read_peer(folder).sae.W_dec.norm(dim=1)
    assert twice.scales is not None
    torch.testing.assert_close(twice.scales.mean, theirs["mean"] * norms)
    (folder / "std.pt").unlink()
    assert "std.pt is missing" in " ".join(read_peer(folder).notes)
    torch.save(torch.rand(3), folder / "mean.pt")
    with pytest.raises(Failure, match="should hold mean of shape"):
        read_peer(folder)


BRUSH: tuple[tuple[Unit, str], ...] = (("mean", "mean"), ("sd", "std"))


def test_top_afa_is_frozen_on_the_linked_store(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_top_afa(tmp_path / "afa", "topafa", d=WIDTH, L=64, standardise=True)
    (stored,) = (tree.root / "activations").iterdir()
    common = Common(root=tree.root)
    ours = convert.run(
        convert.Command(source=tmp_path / "afa", store=stored, site=SITE, name="afa", common=common)
    )
    assert ours is not None and isinstance(load_sae(ours).config.activation, TopAfa)
    said = capsys.readouterr().err
    assert f"it says it is of gpt2-small; it is tied to {tree.sae.config['model']['spec']}" in said
    out = convert.run(
        convert.Command(source=ours, to="saelens", out=tmp_path / "out", common=common)
    )
    said = capsys.readouterr().err
    assert out is not None and "TopAfa has no place in this format" in said and "FVU" in said
    cfg = json.loads((out / "cfg.json").read_text())
    frozen = cfg["metadata"]["frozen"]
    assert cfg["k"] == frozen["k"] and cfg["metadata"]["frozen_from"] == "TopAfa"
    assert frozen["chosen_on"] + frozen["measured_on"] == min(4096, 3970)
    assert isinstance(read_peer(out).sae.config.activation, TopK)
    shutil.rmtree(ours)


# -------------------------------------------------------------------------- what it says of a store


def test_a_delphi_cache_holds_every_firing(
    tree: Tree, store: ActivationStore, tmp_path: Path
) -> None:
    """Read as delphi's TensorBuffer does: latents are counted from the file's first one."""
    command = convert.Command(
        source=tree.sae.path, to="delphi", out=tmp_path / "cache", splits=3,
        common=Common(root=tree.root),
    )  # fmt: skip
    folder = convert.run(command)
    assert folder is not None and folder == tmp_path / "cache" / "layers.1"
    files = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0]))
    borders = [tuple(map(int, path.stem.split("_"))) for path in files]
    assert borders == [(0, 20), (21, 41), (42, 63)]
    sae = load_sae(tree.sae.path)
    n, t = store.run.summary["n_sequences"], store.config.context
    wanted, tokens = np.zeros((n, t, D_SAE), np.float32), np.zeros((n, t), np.int64)
    for number in range(store.n_shards):
        shard = store.shard(number, SITE)
        codes = sae.encode(shard.values.float()).dense(D_SAE).numpy()
        wanted[shard.sequence.numpy(), shard.position.numpy()] = codes
        tokens[shard.first_sequence : shard.first_sequence + len(shard.tokens)] = shard.tokens
    found = np.zeros_like(wanted)
    for path, (start, _) in zip(files, borders, strict=True):
        data = load_file(path)
        assert data["locations"].dtype == np.uint16 and data["activations"].dtype == np.float16
        np.testing.assert_array_equal(data["tokens"], tokens)
        places = data["locations"].astype(np.int64)
        order = np.lexsort(places.T[::-1])
        np.testing.assert_array_equal(order, np.arange(len(places)), "row by row, in order")
        found[places[:, 0], places[:, 1], places[:, 2] + start] = data["activations"]
    np.testing.assert_array_equal(found != 0, wanted > 1e-5)
    np.testing.assert_allclose(found, wanted, rtol=2**-10)
    config = json.loads((folder / "config.json").read_text())
    assert config["n_splits"] == 3 and config["cache_ctx_len"] == t
    assert config["model_name"] == store.run.config["model"]["spec"]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    with pytest.raises(UserError, match="there already"):
        convert.run(command)


def test_a_delphi_cache_with_more_files_than_latents(tree: Tree, tmp_path: Path) -> None:
    for splits in (0, D_SAE + 1):
        command = convert.Command(
            source=tree.sae.path, to="delphi", out=tmp_path, splits=splits,
            common=Common(root=tree.root),
        )  # fmt: skip
        with pytest.raises(UserError, match="--splits"):
            convert.run(command)
    assert not any(tmp_path.iterdir())


FEATURE_FIELDS = {
    "modelId", "layer", "index", "creatorId", "createdAt", "maxActApprox", "hasVector", "vector",
    "vectorLabel", "vectorDefaultSteerStrength", "hookName", "topkCosSimIndices",
    "topkCosSimValues", "neuron_alignment_indices", "neuron_alignment_values",
    "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson",
    "correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson",
    "correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
    "freq_hist_data_bar_heights", "freq_hist_data_bar_values", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist", "sourceSetName",
}  # fmt: skip
ACTIVATION_FIELDS = {
    "id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue",
    "values", "creatorId", "dataSource", "dataIndex", "dfaValues", "dfaTargetIndex", "dfaMaxValue",
    "createdAt", "lossValues", "logitContributions", "binMin", "binMax", "binContains",
    "qualifyingTokenIndex", "zIndices", "zValues",
}  # fmt: skip


def read_lines(path: Path) -> list[dict]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_neuronpedia_import_says_what_the_index_says(tree: Tree, tmp_path: Path) -> None:
    told = NeuronpediaOptions(model_id="tiny", creator_id="me", release="first")
    command = convert.Command(
        source=tree.sae.path, to="neuronpedia", out=tmp_path / "np", neuronpedia=told,
        common=Common(root=tree.root),
    )  # fmt: skip
    folder = convert.run(command)
    assert folder is not None
    assert folder == tmp_path / "np" / "tiny" / f"1-resid-post-{D_SAE}"
    (release,), (model,), (source_set,), (source,) = (
        read_lines(folder / f"{name}.jsonl") for name in ("release", "model", "sourceset", "source")
    )
    assert release["name"] == "first" and model["id"] == "tiny"
    assert source_set["name"] == source["setName"] and source["id"] == folder.name
    assert source["modelId"] == source_set["modelId"] == "tiny"
    features = read_lines(folder / "features" / "batch-0.jsonl.gz")
    activations = read_lines(folder / "activations" / "batch-0.jsonl.gz")
    (place,) = tree.sae.path.glob("index-*")
    ours, sae = FeatureIndex.open(place), load_sae(tree.sae.path)
    assert [row["index"] for row in features] == [str(i) for i in range(D_SAE)]
    assert all(set(row) == FEATURE_FIELDS for row in features)
    assert all(set(row) == ACTIVATION_FIELDS for row in activations)
    for feature in (ours.next_alive(0), ours.next_alive(30)):
        row, known = features[feature], ours.feature(feature)
        assert row["frac_nonzero"] == pytest.approx(known["density"], rel=1e-5)
        assert row["maxActApprox"] == pytest.approx(known["max"], rel=1e-5)
        assert sum(row["freq_hist_data_bar_heights"]) == known["n_active"]
        assert len(row["freq_hist_data_bar_heights"]) == len(row["freq_hist_data_bar_values"])
        np.testing.assert_allclose(row["vector"], sae.W_dec[feature].numpy(), atol=1e-5)
        assert row["pos_str"] == known["positive_tokens"]
        assert row["topkCosSimIndices"] == ours.neighbours(feature)["neighbour"].tolist()
        assert row["hookName"] == "blocks.1.hook_resid_post"
        largest = np.abs(sae.W_dec[feature].numpy()).argmax()
        assert row["neuron_alignment_indices"][0] == largest
        shown = [line for line in activations if line["index"] == str(feature)]
        examples = ours.examples(feature)
        examples = examples[examples["kind"] != "random"]
        assert len(shown) == len(examples)
        tops = [line for line in shown if line["binMin"] == -1]
        assert len(tops) == (examples["kind"] == "top").sum()
        assert tops[0]["maxValue"] == pytest.approx(known["max"], rel=1e-5)
        for line in shown:
            assert len(line["tokens"]) == len(line["values"])
            assert line["values"][line["maxValueTokenIndex"]] == line["maxValue"]
            if line["binMin"] != -1:
                value = line["values"][line["qualifyingTokenIndex"]]
                slack = 1e-5 * known["max"]
                assert line["binMin"] - slack <= value <= line["binMax"] + slack
        shares = {line["binMin"]: line["binContains"] for line in shown if line["binMin"] != -1}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    dead = [row for row in features if not ours.feature(int(row["index"]))["alive"]]
    assert all(row["maxActApprox"] == 0 and row["frac_nonzero"] == 0 for row in dead)
    assert len({line["id"] for line in activations}) == len(activations)
    again = convert.Command(
        source=place, to="neuronpedia", out=tmp_path / "again", neuronpedia=told,
        common=Common(root=tree.root),
    )  # fmt: skip
    other = convert.run(again)
    assert other is not None
    for path in folder.rglob("*.jsonl*"):
        assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes()


def test_a_model_named_by_its_path_stays_inside_the_folder(tree: Tree, tmp_path: Path) -> None:
    command = convert.Command(
        source=tree.sae.path, to="neuronpedia", out=tmp_path / "np", common=Common(root=tree.root)
    )
    assert str(tree.sae.config["model"]["spec"]).startswith("/")
    folder = convert.run(command)
    assert folder is not None and folder.is_relative_to(tmp_path / "np")
    assert K == 4
