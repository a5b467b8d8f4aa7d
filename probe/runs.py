"""Run folders: one folder holds one result, and its manifest exists if and only if it is complete.

    <root>/<name>-<hash8>/
        config.json      what was asked, every default spelled out; written first
        ...              the data
        manifest.json    what came out; written last and renamed into place

`hash8` is the first eight hex digits of the SHA-256 of the config's canonical JSON, so the same
question finds the same folder again: complete, it is reused; incomplete, it is resumed. The
manifest records schema number, git commit, versions, device, seeds, hashes of inputs, a summary,
and size and checksum of every file, which `verify` compares with what is there.

Runs may be nested (an SAE's index lives inside the SAE's folder); a manifest lists its own files.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probe.errors import Failure, UserError

SCHEMA = 1
CONFIG, MANIFEST, LOCK = "config.json", "manifest.json", ".lock"
VERSIONED = ("torch", "transformers", "safetensors", "pyarrow", "duckdb", "lorgnette")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, renamed to `path` on success and removed on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `Failure` where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise Failure(f"{path} is missing; make the folder {path.parent} again.") from error
    except ValueError as error:
        raise Failure(
            f"{path} is not valid JSON ({error}); delete {path.parent} and make it again."
        ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """First eight hex digits of the SHA-256 of the config's canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


class Run:
    """A run folder. Make one with `Run.create`, open one with `Run.open`."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config

    @staticmethod
    def create(parent: Path, name: str, config: dict[str, Any]) -> "Run":
        """Make `parent/<name>-<hash8>/` with its config, or reopen it where it is already there."""
        assert "kind" in config, "every run's config says its kind"
        git_commit()  # asked now and remembered: the work tree may move on while a long run goes on
        config = json.loads(json.dumps(config, allow_nan=False))
        path = Path(parent) / f"{name}-{config_hash(config)}"
        if (path / CONFIG).exists():
            run = Run.open(path)
            if run.config == config:
                return run
            raise Failure(
                f"{path / CONFIG} was changed after the folder was made; "
                f"delete {path} and try again."
            )
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / CONFIG, config)
        return Run(path, config)

    @staticmethod
    def open(path: Path) -> "Run":
        """Open a run folder, complete or not.

        Raises `UserError` where `path` is no run folder, `Failure` where its config is damaged.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise UserError(
                f"{path} is not a folder that lorgnette wrote (it has no {CONFIG}); "
                "`lorgnette runs` lists those there are."
            )
        config = read_json(path / CONFIG)
        if not is_run_config(config):
            raise Failure(
                f"{path / CONFIG} does not say its kind; delete {path} and make it again."
            )
        return Run(path, config)

    @property
    def kind(self) -> str:
        """What the folder holds: activations, sae, evaluation, index, map, report, corpus ..."""
        return self.config["kind"]

    @property
    def complete(self) -> bool:
        """Whether the work that fills this folder has finished."""
        return (self.path / MANIFEST).is_file()

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest. Raises `Failure` where the run is incomplete or of an unknown schema."""
        if not self.complete:
            raise Failure(
                f"{self.path} is not complete; run the command that makes it again: it resumes."
            )
        manifest = read_json(self.path / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            found = manifest.get("schema") if isinstance(manifest, dict) else manifest
            raise Failure(
                f"{self.path / MANIFEST} has schema {found!r} where this version reads {SCHEMA}; "
                "use the version that wrote it, or make the folder again."
            )
        return manifest

    @property
    def summary(self) -> dict[str, Any]:
        """The few numbers worth listing of a complete run; empty for an incomplete one."""
        return self.manifest["summary"] if self.complete else {}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for writing. Raises `UserError` where another process holds it."""
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"another process is writing {self.path}; wait for it, or stop it first."
                ) from error
            yield

    def finish(
        self,
        *,
        summary: Mapping[str, Any],
        inputs: Mapping[str, str],
        seeds: Mapping[str, int],
        device: str,
    ) -> None:
        """Write the manifest, last of all files: from here on the run counts as complete."""
        files = {
            name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for name, path in own_files(self.path).items()
        }
        write_json(
            self.path / MANIFEST,
            {
                "schema": SCHEMA,
                "kind": self.kind,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "git_commit": git_commit(),
                "versions": versions(),
                "machine": machine(),
                "device": device,
                "seeds": dict(seeds),
                "inputs": dict(inputs),
                "summary": dict(summary),
                "files": files,
            },
        )


def own_files(folder: Path) -> dict[str, Path]:
    """The files that belong to the run in `folder`, nested runs, lock and manifest left out."""
    found: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not (entry / CONFIG).is_file():
            found |= {f"{entry.name}/{name}": path for name, path in own_files(entry).items()}
        elif entry.is_file() and entry.name != MANIFEST and not entry.name.startswith("."):
            found[entry.name] = entry
    return found


def find_runs(root: Path, kind: str | None = None) -> list[Run]:
    """Every run folder below `root`, nested ones too, sorted by path; only one kind where given."""
    if not Path(root).is_dir():
        return []
    configs = ((path.parent, read_json(path)) for path in sorted(Path(root).rglob(CONFIG)))
    runs = [Run(folder, config) for folder, config in configs if is_run_config(config)]
    return [run for run in runs if kind is None or run.kind == kind]


def newest_run(folder: Path, kind: str) -> Run | None:
    """The newest complete run of a kind below a folder; None where there is none."""
    complete = [run for run in find_runs(folder, kind) if run.complete]
    return max(complete, key=lambda run: run.manifest["created"], default=None)


def is_run_config(config: Any) -> bool:
    """Whether a `config.json` is a run's, and not one of the many that model folders hold."""
    return isinstance(config, dict) and isinstance(config.get("kind"), str)


def verify(run: Run) -> list[str]:
    """What is wrong with a complete run's files, one sentence each; empty where all is sound."""
    problems = []
    for name, recorded in run.manifest["files"].items():
        path = run.path / name
        if not path.is_file():
            problems.append(f"{path} is missing.")
        elif path.stat().st_size != recorded["bytes"]:
            problems.append(
                f"{path} has {path.stat().st_size} bytes where the manifest says "
                f"{recorded['bytes']}."
            )
        elif sha256_file(path) != recorded["sha256"]:
            problems.append(f"{path} is not the file that was written: its checksum differs.")
    return problems


@functools.cache
def git_commit() -> str | None:
    """The commit of the running code, `+changes` where the work tree differs; None outside git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def machine() -> str:
    """The machine in words: processor, cores, memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.machine()} {platform.system()}, {cores} cores, {memory:.0f} GiB"
