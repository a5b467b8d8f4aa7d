"""Results kept line by line, so that work that was stopped goes on with the line it lacks."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON lines, each result with its key; a line cut off by a kill does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = {}
        whole = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for line in lines:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError:
                break
            self.rows[row["key"]] = row["value"]
            whole += len(line)
        if lines:
            with path.open("r+b") as file:
                file.truncate(whole)

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, value: Any) -> None:
        """Keep a result."""
        line = json.dumps({"key": key, "value": value}, allow_nan=False) + "\n"
        with self.path.open("a") as file:
            file.write(line)
        self.rows[key] = value
