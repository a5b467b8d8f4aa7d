import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from probe.errors import Failure, UserError
from saes.activations import TopK
from saes.constraints import initialise
from saes.folder import load_sae, sae_metadata, save_sae
from saes.models import Normalize, SaeConfig, SparseAutoencoder


def saved(folder: Path, normalize: Normalize = "none") -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_in=6, d_sae=20, activation=TopK(k=4), normalize=normalize))
    x = torch.randn(32, 6, generator=generator) * 3 + 1
    initialise(sae, x, generator)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=generator)
    folder.mkdir(exist_ok=True)
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    save_sae(sae, folder, metadata=metadata, golden_x=x)
    return sae


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The format as its description has it: length, JSON header, raw little-endian data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    kinds = {"F32": np.float32, "I64": np.int64}
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(data[start:end], kinds[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_an_independent_reader_computes_the_same(tmp_path: Path, normalize: Normalize) -> None:
    saved(tmp_path, normalize)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    w = read_safetensors(tmp_path / "sae_weights.safetensors")
    golden = read_safetensors(tmp_path / "golden.safetensors")
    assert cfg["architecture"] == "topk" and cfg["apply_b_dec_to_input"] is True
    assert {name: tensor.shape for name, tensor in w.items()} == {
        "W_enc": (6, 20), "W_dec": (20, 6), "b_enc": (20,), "b_dec": (6,)
    }  # fmt: skip
    x = golden["x"]
    mean, deviation = np.zeros((32, 1)), np.ones((32, 1))
    if cfg["normalize_activations"] == "layer_norm":
        mean, deviation = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    eps = 1e-5 if cfg["normalize_activations"] == "layer_norm" else 0
    normal = (x - mean) / (deviation + eps)
    pre = (normal - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    codes = np.zeros_like(pre)
    kept = np.argsort(-pre, axis=1)[:, : cfg["k"]]
    np.put_along_axis(codes, kept, np.maximum(np.take_along_axis(pre, kept, 1), 0), 1)
    stored = np.zeros_like(pre)
    for row, (indices, values) in enumerate(zip(golden["indices"], golden["values"], strict=True)):
        np.add.at(stored[row], indices, values)
    np.testing.assert_allclose(stored, codes, atol=1e-5)
    reconstruction = (codes @ w["W_dec"] + w["b_dec"]) * deviation + mean
    np.testing.assert_allclose(golden["reconstruction"], reconstruction, atol=1e-4)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_round_trip_is_bitwise(tmp_path: Path, normalize: Normalize) -> None:
    sae = saved(tmp_path, normalize)
    loaded = load_sae(tmp_path)
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.W_enc.T.is_contiguous()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.randn(10, 6)
    assert torch.equal(loaded(x).reconstruction, sae(x).reconstruction)


def test_metadata_say_the_format_and_where_it_belongs(tmp_path: Path) -> None:
    saved(tmp_path)
    metadata = sae_metadata(tmp_path)
    assert metadata["sae_lens_version"] == "6.0.0"
    assert metadata["training_architecture"] == "topk"
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert metadata["prepend_bos"] is False


def test_saving_leaves_nothing_but_its_three_files(tmp_path: Path) -> None:
    saved(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "golden.safetensors"}


def test_no_sae_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished SAE"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "golden.safetensors"])
def test_truncated_or_missing_files_do_not_load(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    data = (tmp_path / name).read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(Failure, match="damaged"):
            load_sae(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(Failure, match="missing"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "golden.safetensors"])
def test_tampered_numbers_do_not_load(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-60:] = bytes(60)
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(Failure, match="no longer says what it said"):
        load_sae(tmp_path)


def test_weights_of_another_sae_do_not_load(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    saved(tmp_path / "two", "layer_norm")
    cfg = (tmp_path / "two" / "cfg.json").read_text()
    (tmp_path / "one" / "cfg.json").write_text(cfg)
    with pytest.raises(Failure, match="no longer says what it said"):
        load_sae(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "transcoder"}, "architecture = 'transcoder'"),
        ({"architecture": "gated"}, "describes no SAE"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input"),
        ({"finetuning_scaling_factor": True}, "keys this version does not know"),
        ({"d_sae": 21}, "do not belong together"),
        ({"d_sae": "many"}, "describes no SAE"),
        ({"k": 21}, "describes no SAE"),
        ({"k": 5}, "does not fit"),
    ],
)
def test_a_description_we_do_not_understand_does_not_load(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    saved(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(Failure, match=words):
        load_sae(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"architecture": "topk"}'])
def test_a_damaged_description_does_not_load(tmp_path: Path, text: str) -> None:
    saved(tmp_path)
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(Failure):
        load_sae(tmp_path)


def test_golden_indices_out_of_range_do_not_load(tmp_path: Path) -> None:
    saved(tmp_path)
    from safetensors.torch import load_file, save_file

    golden = load_file(tmp_path / "golden.safetensors")
    golden["indices"][0, 0] = 20
    save_file(golden, tmp_path / "golden.safetensors")
    with pytest.raises(Failure, match="does not fit"):
        load_sae(tmp_path)
