"""The one command, `lorgnette`: a table of subcommands, each a module of `app.commands`.

A subcommand's module has a frozen dataclass `Command`, whose fields are the options, and a function
`run(command)` that gives the folder it wrote, a list of several, or None. Only the module that is
asked for is imported, so `lorgnette --help` answers at once. Progress and messages go to stderr;
the folder is the last line on stdout (of several, each has a line), so commands compose.

Exit status: 0 done, 1 the work failed, 2 the person's mistake, 130 stopped from the keyboard.
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "the main job on a small scale: capture, train, evaluate, index, then the dashboard",
    "capture": "run a model over a corpus and keep the activations of some sites",
    "train": "train a sparse autoencoder on a store, or straight from a model",
    "sweep": "train many at once: activations, seeds and sites on one stream",
    "evaluate": "how well an SAE does its job, beside PCA, random and untrained controls",
    "index": "make an SAE's features browsable: statistics, examples, tokens, logits, neighbours",
    "steer": "run recipes: the model's own text and the steered one, side by side",
    "label": "name every feature in a few words, offline, and say how far the name can be trusted",
    "map": "an SAE's features in two dimensions, with clusters, beside random directions",
    "compare": "match the features of two SAEs, beside what chance matches",
    "analyse": "run a study and write its report",
    "convert": "read and write the SAE formats of other projects",
    "dashboard": "browse everything in the browser, at http://127.0.0.1:8501",
    "runs": "list what there is",
    "doctor": "check the installation, the machine and every file that was written",
    "make": "make what ships with the project: the built-in corpus, toy-turbo",
}

USAGE = """usage: lorgnette COMMAND [OPTIONS]

From a language model to features that a person browses.

{table}

`lorgnette COMMAND --help` explains a command. Every command takes --root (where results are kept,
default artifacts/) and --dry-run (say what would be done, and do nothing).
Start with `lorgnette demo`.
"""


def main() -> None:
    """Entry point of the console script."""
    sys.exit(dispatch(sys.argv[1:]))


def dispatch(arguments: Sequence[str]) -> int:
    """Run one subcommand and give the exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        sys.stderr.write(
            f"lorgnette: {name!r} is no command; wanted one of {', '.join(COMMANDS)}.\n"
        )
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("probe", "saes", "analyses", "app"):
        logging.getLogger(package).setLevel(logging.INFO)
    return explain_trouble(name, rest)


def usage() -> str:
    """The list of commands, a line each."""
    return USAGE.format(table="\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()))


def explain_trouble(name: str, arguments: Sequence[str]) -> int:
    """Run a subcommand, turning every kind of trouble into one sentence and an exit status."""
    from probe.errors import Failure, UserError

    try:
        return run_command(name, arguments)
    except UserError as error:
        return trouble(name, str(error), 2)
    except Failure as error:
        return trouble(name, str(error), 1)
    except KeyboardInterrupt:
        return trouble(name, "stopped; the same command goes on from the last checkpoint.", 130)
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return trouble(name, "the disk is full; free some space and run it again.", 1)
        return trouble(name, f"{error.strerror or error}: {error.filename or 'no file named'}.", 1)
    except Exception as error:
        if "LORGNETTE_DEBUG" in os.environ:
            raise
        text = " ".join(str(error).split())
        return trouble(
            name,
            f"an error nobody foresaw ({type(error).__name__}: {text}); "
            "run it again with LORGNETTE_DEBUG=1 to see where.",
            1,
        )


def trouble(name: str, sentence: str, status: int) -> int:
    """Say a sentence on stderr and pass the status on."""
    sys.stderr.write(f"lorgnette {name}: {sentence}\n")
    return status


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Parse a subcommand's options, run it, and write the folder it made on stdout."""
    import tyro

    module = importlib.import_module(f"app.commands.{name}")
    command = tyro.cli(
        module.command_type(arguments) if hasattr(module, "command_type") else module.Command,
        args=list(arguments),
        default=module.default(arguments) if hasattr(module, "default") else None,
        prog=f"lorgnette {name}",
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.AvoidSubcommands,
        ),
    )
    made = module.run(command)
    for folder in made if isinstance(made, list) else [made]:
        if folder is not None:
            sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    main()
