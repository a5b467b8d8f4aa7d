import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from probe.errors import Failure, UserError
from probe.runs import MANIFEST, Run, atomic_path, config_hash, find_runs, verify, write_json


def make_run(parent: Path, name: str = "thing", **config: object) -> Run:
    run = Run.create(parent, name, {"kind": "sae", **config})
    (run.path / "data.bin").write_bytes(b"0123456789")
    run.finish(summary={"n": 1}, inputs={"a": "b"}, seeds={"seed": 0}, device="cpu")
    return run


def test_folder_name_is_the_hash_of_the_canonical_config(tmp_path):
    # sha256('{"a":1,"kind":"x"}') begins 9f24...: computed here by hand from the bytes
    import hashlib

    expected = hashlib.sha256(b'{"a":1,"kind":"x"}').hexdigest()[:8]
    assert config_hash({"kind": "x", "a": 1}) == config_hash({"a": 1, "kind": "x"}) == expected
    run = Run.create(tmp_path, "name", {"kind": "x", "a": 1})
    assert run.path.name == f"name-{expected}"
    assert Run.create(tmp_path, "name", {"a": 1, "kind": "x"}).path == run.path
    assert Run.create(tmp_path, "name", {"a": 2, "kind": "x"}).path != run.path


def test_a_run_is_complete_once_its_manifest_is_there(tmp_path):
    run = Run.create(tmp_path, "thing", {"kind": "sae"})
    assert not run.complete
    assert run.summary == {}
    with pytest.raises(Failure, match="not complete"):
        _ = run.manifest
    run = make_run(tmp_path)
    assert run.complete
    assert run.summary == {"n": 1}
    assert run.manifest["files"]["data.bin"]["bytes"] == 10
    assert verify(run) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify_finds_damage(tmp_path, damage):
    run = make_run(tmp_path)
    path = run.path / "data.bin"
    if damage == "flip":
        path.write_bytes(b"0123456788")
    elif damage == "truncate":
        path.write_bytes(b"01234")
    else:
        path.unlink()
    (problem,) = verify(run)
    assert str(path) in problem


def test_nested_runs_are_not_their_parents_files(tmp_path):
    outer = make_run(tmp_path)
    inner = make_run(outer.path, "index")
    outer.finish(summary={}, inputs={}, seeds={}, device="cpu")
    assert set(outer.manifest["files"]) == {"config.json", "data.bin"}
    assert [run.path for run in find_runs(tmp_path)] == [outer.path, inner.path]


def test_other_peoples_config_files_are_not_runs(tmp_path):
    write_json(tmp_path / "model" / "config.json", {"model_type": "llama"})
    assert find_runs(tmp_path) == []
    with pytest.raises(Failure, match="kind"):
        Run.open(tmp_path / "model")


def test_opening_what_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="lorgnette runs"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"kind": ')
    with pytest.raises(Failure, match="not valid JSON"):
        Run.open(tmp_path)


def test_an_edited_config_and_an_unknown_schema_are_refused(tmp_path):
    run = make_run(tmp_path, a=1)
    manifest = json.loads((run.path / MANIFEST).read_text())
    (run.path / MANIFEST).write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(Failure, match="schema 99"):
        _ = run.manifest
    (run.path / "config.json").write_text('{"kind": "sae", "a": 2}')
    with pytest.raises(Failure, match="was changed"):
        Run.create(tmp_path, "thing", {"kind": "sae", "a": 1})


def test_atomic_path_leaves_nothing_behind_on_error(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_writers_do_not_meet(tmp_path):
    run = make_run(tmp_path)
    code = f"""
        import time
        from pathlib import Path
        from probe.runs import Run
        with Run.open(Path({str(run.path)!r})).lock():
            Path({str(tmp_path / "held")!r}).touch()
            time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    with pytest.raises(UserError, match="another process"), run.lock():
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run.lock():  # the lock of a killed process is free again
        pass
