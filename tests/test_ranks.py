"""Two processes equal one: capture, training with the rows divided, and with the latents divided.

The processes are real and talk through gloo; what they do is in `ranks_worker`. One test goes the
whole way through torchrun; the others start their two processes from a server that has imported
everything once, and tell them who they are as torchrun does.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import ranks_worker
import torch
from ranks_worker import (
    CASES,
    COMMANDS,
    SHARDED,
    SITE,
    SMALL,
    WIDENED,
    Rows,
    make_job,
    make_stream,
)
from safetensors.torch import load_file
from test_store import config_for, contents, write_corpus

from app.cli import dispatch
from probe.errors import UserError
from probe.ranks import ALONE, Ranks, create_run, joined
from probe.runs import Run, find_runs, own_files, verify
from probe.store_writing import write_store
from probe.toy import tiny_llama
from saes.activations import BatchTopK, TopK
from saes.checkpoints import checkpoint_paths, load_checkpoint
from saes.folder import WEIGHTS, load_sae
from saes.sharded import Shards, _directions
from saes.training import fit, read_metrics

TOP = Path(__file__).parent.parent
TIMING = ("tokens_per_s", "seconds")
CAPTURE = (
    "capture", "{folder}/tiny", "{folder}/corpus.jsonl", "--sites", SITE, "--shard-batches", "3",
    *SMALL,
)  # fmt: skip


def two_processes(task: str, folder: Path) -> list[int | None]:
    """Do a task of `ranks_worker` on two processes; when one dies so does the other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_worker"])
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    both = [
        context.Process(target=ranks_worker.work, args=(rank, port, task, str(folder)))
        for rank in (0, 1)
    ]
    for process in both:
        process.start()
    running = list(both)
    while running:
        assert wait([process.sentinel for process in running], timeout=300), f"{task} hangs"
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode for process in both):
            for process in running:
                process.terminate()
    return [process.exitcode for process in both]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a corpus and a model, and what two processes made of every case in it."""
    folder = tmp_path_factory.mktemp("ranks")
    write_corpus(folder / "corpus.jsonl")
    tiny = tiny_llama()
    tiny.model.save_pretrained(folder / "tiny")
    tiny.tokenizer.save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TOP), str(Path(__file__).parent)]))
        # Rank 1 kills itself in the last case; had another one failed, it would have ended by that.
        assert two_processes("train_all", folder)[1] == -signal.SIGKILL
        yield folder


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Run]:
    """The same cases, trained by one process."""
    jobs = {name: make_job(ALONE, place / "alone", name) for name in CASES | SHARDED}
    fit(list(jobs.values()), Rows(), progress=False)
    return {name: job.run for name, job in jobs.items()}


def stop_at_step_21(run: Run, made: Path) -> None:
    """Give a run what another one had when it was at step 21 of 24."""
    old = checkpoint_paths(made)[0]
    assert old.name == "step-000021"
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / old.name).symlink_to(old)
    (run.path / "metrics.jsonl").write_bytes((made / "metrics.jsonl").read_bytes())


@pytest.fixture(scope="module")
def resumed(place: Path, alone: dict[str, Run]) -> Path:
    """The killed training gone on, one process's by two, and a capture killed in its turn."""
    stop_at_step_21(make_job(ALONE, place / "widened", WIDENED).run, alone[WIDENED].path)
    config = config_for(str(place / "corpus.jsonl"))
    run = Run.create(place, "store", config.run_config())
    run.path.rename(place / "store")
    assert two_processes("resume", place)[1] == -signal.SIGKILL
    return place


def assert_same_training(found: Path, wanted: Path) -> None:
    weights, expected = load_file(found / WEIGHTS), load_file(wanted / WEIGHTS)
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    rows, wanted_rows = (read_metrics(path / "metrics.jsonl") for path in (found, wanted))
    assert len(rows) == len(wanted_rows)
    for row, expected_row in zip(rows, wanted_rows, strict=True):
        assert set(row) == set(expected_row)
        for name in set(row) - set(TIMING):
            assert row[name] == pytest.approx(expected_row[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", [*CASES, *SHARDED])
def test_two_processes_train_what_one_does(place, alone, name):
    made = place / alone[name].path.name
    assert_same_training(made, alone[name].path)
    assert verify(Run.open(made)) == []
    assert Run.open(made).summary["d_sae"] == load_sae(made).config.d_sae


def test_the_cases_reach_what_is_exchanged(alone):
    """Dead latents were trained by AuxK, and few latents were touched where that is the point."""
    for name in ("topk", "batch_topk", "sharded", "sharded_large", "few_touched"):
        assert any(row["auxk"] > 0 for row in read_metrics(alone[name].path / "metrics.jsonl"))
    tensors, _ = load_checkpoint(alone["few_touched"].path) or pytest.fail("no checkpoint")
    # At most 3 entries and 8 of AuxK in each of 63 rows, of 2048 latents.
    moved = (tensors["exp_avg.W_enc"] != 0).any(1).float().mean()
    assert 0 < moved < 0.9


def test_a_killed_sharded_run_ends_with_the_same_bits(resumed):
    (killed,) = (resumed / "killed").iterdir()
    (whole,) = resumed.glob("sharded-*")
    assert Run.open(killed).complete
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for path in (killed, whole):
        names = [checkpoint.name for checkpoint in checkpoint_paths(path)]
        assert names == ["step-000021", "step-000024"]
    found, wanted = (load_checkpoint(path) for path in (killed, whole))
    assert found is not None and wanted is not None
    assert all(torch.equal(found[0][name], wanted[0][name]) for name in wanted[0])


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("batch_topk", ["state.json", "state.safetensors"]),
        (
            "sharded_odd",
            ["state-0-of-2.safetensors", "state-1-of-2.safetensors", "state.json"],
        ),
    ],
)
def test_a_checkpoint_of_two_processes_serves_one(place, alone, tmp_path, name, files):
    """One process goes on from step 21 of two, and ends where one process ends."""
    (made,) = place.glob(f"{name}-*")
    assert sorted(path.name for path in checkpoint_paths(made)[0].iterdir()) == files
    job = make_job(ALONE, tmp_path, name)
    stop_at_step_21(job.run, made)
    fit([job], Rows(), progress=False)
    assert_same_training(job.run.path, alone[name].path)


def test_a_checkpoint_of_one_process_serves_two(resumed, alone):
    (made,) = (resumed / "widened").iterdir()
    assert_same_training(made, alone[WIDENED].path)


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_every_rank_reads_its_latents(place, alone, n_ranks):
    (made,) = place.glob("sharded_odd-*")
    whole, numbers = load_checkpoint(made) or pytest.fail("no checkpoint")
    assert whole["parameter.W_dec"].shape == (75, 16) and numbers["parts"] == 2
    parts = [Ranks(rank=rank, size=n_ranks).part(75) for rank in range(n_ranks)]
    assert [i for part in parts for i in part] == list(range(75))
    read = [load_checkpoint(made, latents=part) or pytest.fail("none") for part in parts]
    for name in ("parameter.W_enc", "exp_avg_sq.b_enc", "silent_tokens"):
        assert torch.equal(torch.cat([tensors[name] for tensors, _ in read]), whole[name])
    assert all(torch.equal(part["parameter.b_dec"], whole["parameter.b_dec"]) for part, _ in read)


@pytest.mark.parametrize(("n", "d"), [(1, 3), (511, 3), (513, 7), (1537, 5), (2048, 16)])
def test_directions_are_those_of_one_draw(n, d):
    drawn = list(_directions(n, d, torch.Generator().manual_seed(3)))
    wanted = torch.randn(n, d, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([rows for _, rows in drawn]), wanted)
    lengths = [len(rows) for _, rows in drawn]
    assert [first for first, _ in drawn] == [sum(lengths[:i]) for i in range(len(lengths))]


def test_choices_over_ranks_by_hand(place):
    small = [torch.load(place / f"small-{rank}.pt", weights_only=True) for rank in (0, 1)]
    # Of 3 1 2 | 2 2 5 2 the four strongest are 5, 3 and the first two of the 2s.
    assert [part["pool.values"].tolist() for part in small] == [[3.0, 2.0], [2.0, 5.0]]
    assert [part["pool.latents"].tolist() for part in small] == [[0, 2], [0, 2]]
    assert [part["pool.lengths"].tolist() for part in small] == [[1, 1], [1, 1]]
    # Two of each row: 4 1 | 3 2 keeps 4 and 3; of 2 0 | 2 2 the lowest rank's 2 comes first.
    assert [part["winners.values"].tolist() for part in small] == [[4.0, 2.0], [3.0, 2.0]]
    assert [part["winners.latents"].tolist() for part in small] == [[5, 1], [5, 1]]
    assert [part["winners.lengths"].tolist() for part in small] == [[1, 1], [1, 1]]


def test_a_stream_captured_together_is_the_same_stream(place):
    source = make_stream(place / "corpus.jsonl", ALONE)
    wanted = {"sample": source.sample(40)}
    wanted |= {str(i): x for i, x in zip(range(20), source.batches(3), strict=False)}
    for rank in (0, 1):
        found = torch.load(place / f"small-{rank}.pt", weights_only=True)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_killed_capture_goes_on_with_another_number_of_processes(resumed, tmp_path):
    model, config = tiny_llama(0), config_for(str(resumed / "corpus.jsonl"))
    killed = Run.open(resumed / "store")
    written = sorted(path.name for path in killed.path.glob("rows-*"))
    # Of shards 0 to 4 rank 1 wrote the first of its own, and rank 0 at least that of its own.
    assert "rows-00001.safetensors" in written and "rows-00003.safetensors" not in written
    assert not killed.complete
    whole = write_store(Run.create(tmp_path, "one", config.run_config()), model, progress=False)
    assert contents(write_store(killed, model, progress=False).run.path) == contents(whole.run.path)


def test_training_from_a_stream_by_the_command(resumed, capsys):
    """Rows divided, and latents divided; the two processes share the captures."""
    made = {run.path.name: run for run in find_runs(resumed / "pair", "sae")}
    assert len(made) >= len(COMMANDS)
    for arguments in COMMANDS:
        words = [argument.format(folder=resumed) for argument in arguments]
        assert dispatch([*words, "--root", str(resumed / "single")]) == 0
        wanted = Path(capsys.readouterr().out.strip())
        assert_same_training(made[wanted.name].path, wanted)


def test_capture_and_training_by_torchrun(place, capsys):
    """`lorgnette capture`, then `lorgnette train` on its store, by two processes and by one."""
    words = [argument.format(folder=place) for argument in CAPTURE]
    sizes = ["--d-sae", "64", "--k", "4", "--steps", "6", "--batch-size", "63"]
    roots = [["--root", str(place / name)] for name in ("single", "torchrun")]
    assert dispatch([*words, *roots[0]]) == 0
    store = Path(capsys.readouterr().out.strip())
    assert dispatch(["train", str(store), *sizes, *roots[0]]) == 0
    sae = Path(capsys.readouterr().out.strip())
    found_store = place / "torchrun" / "activations" / store.name
    lines = torchrun(
        place / "both.py", [[*words, *roots[1]], ["train", str(found_store), *sizes, *roots[1]]]
    )
    assert lines[0] == str(found_store) and len(lines) == 2  # the second rank says nothing
    assert contents(found_store) == contents(store) and len(own_files(store)) > 10
    assert Run.open(found_store).summary == Run.open(store).summary
    # The store's manifest says when it was made, so the SAEs' folders differ in name.
    assert_same_training(Path(lines[1]), sae)


def torchrun(script: Path, commands: list[list[str]]) -> list[str]:
    """Commands, one after the other on two processes of torchrun; gives the lines of stdout."""
    script.write_text(
        "import sys\nfrom app.cli import dispatch\nfrom probe.ranks import joined\n"
        f"with joined():\n    sys.exit(any([dispatch(words) for words in {commands!r}]))\n"
    )
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script))
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ------------------------------------------------------------------------------ one process


def test_without_torchrun_there_is_one_rank_and_no_group(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks == ALONE and not torch.distributed.is_initialized()
    x = torch.tensor([1.0, 2.0])
    assert ranks.summed(x) is x and ranks.gathered(x).tolist() == [[1.0, 2.0]]
    assert ranks.joined_rows(x)[0] is x and ranks.all_say(True) and not ranks.first_says(False)
    run = create_run(ranks, tmp_path, "x", {"kind": "sae"})
    assert json.loads((run.path / "config.json").read_text()) == {"kind": "sae"}


@pytest.mark.parametrize(
    ("d_sae", "activation", "said"),
    [
        (64, BatchTopK(k=4), "for topk without its multi loss, got batch_topk"),
        (64, TopK(k=4, multi=True), "for topk without its multi loss"),
        (64, TopK(k=10), "must hold at least k = 10 latents"),
    ],
)
def test_what_cannot_be_sharded_is_the_users_mistake(d_sae, activation, said):
    with pytest.raises(UserError, match=said):
        Shards(ranks=Ranks(rank=0, size=8)).check(d_sae, activation)
