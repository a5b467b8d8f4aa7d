"""`lorgnette dashboard`: serve the browser pages on this machine only."""

import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from app.commands.options import Common, say
from probe.errors import UserError

ADDRESS = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Browse everything below the root in the browser. Stop it with Ctrl-C.

    Example: lorgnette dashboard --port 8600
    """

    port: int = 8501
    """Port on 127.0.0.1."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> None:
    """Serve until stopped."""
    url = f"http://{ADDRESS}:{command.port}"
    check_port(command.port)
    if command.common.dry_run:
        say(f"lorgnette dashboard would serve {command.common.root} at {url}")
        return
    say(f"serving {command.common.root} at {url} (stop with Ctrl-C)")
    os.environ["LORGNETTE_ROOT"] = str(command.common.root.resolve())
    app = Path(__file__).resolve().parent.parent / "dashboard.py"
    # The theme and the privacy settings in .streamlit/config.toml are read from the folder that
    # the server runs in.
    os.chdir(app.parent.parent)
    options = ["--server.address", ADDRESS, "--server.port", str(command.port)]
    options += ["--server.headless", "true", "--browser.gatherUsageStats", "false"]
    arguments = [sys.executable, "-m", "streamlit", "run", str(app), *options]
    os.execv(sys.executable, arguments)


def check_port(port: int) -> None:
    """Raises `UserError` where the port cannot be served on."""
    if not 0 < port < 65536:
        raise UserError(f"--port must be 1 to 65535, got {port}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise UserError(
                f"port {port} on {ADDRESS} is in use or not allowed ({error.strerror}); "
                "stop what uses it, or choose another with --port."
            ) from error
