"""`lorgnette label`: a short phrase for every feature, and how far it can be trusted."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.table import Table
from tyro.conf import Positional, arg

from app.commands.options import Common, find_run, plan, say
from app.resolve import manifest_hash, store_of, weights_hash
from probe.errors import UserError
from probe.models import resolve_device
from probe.runs import Run, newest_run, sha256_file
from probe.store import ActivationStore
from saes.feature_queries import FeatureIndex
from saes.folder import load_sae
from saes.label_asking import asked_table, endpoint_labels, unscored_table
from saes.label_endpoint import ANSWERS, Answers, Endpoint
from saes.label_files import read_label_file
from saes.label_images import Images, ImageSubject, image_labels
from saes.label_pool import Pool, encode_pool
from saes.label_schema import KIND, LabelConfig, Method, write_labels
from saes.label_sequences import Sequences
from saes.label_texts import Texts
from saes.labels import Subject, offline_labels

SECONDS_A_FEATURE = 0.02
"""What an offline label takes on one core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Give every feature a label: a short phrase, tested on text that it was not made from.

    offline: from the index, and some sequences of its store that are encoded again: no key and no
    network. A label such as '"river" and its forms' or
    'after "of the"' stands for a rule that a machine can check. file: labels that you have already
    (CSV, JSON or Parquet with the columns feature and label). endpoint: a model behind an
    OpenAI-compatible address writes them; the key is read from an environment variable.

    The score is the balanced accuracy of detection: told half of a feature's active and silent
    contexts, does the label tell the other half apart? 0.5 is chance. The control is the same score
    with other features' labels. Labels from a file are scored where an endpoint is named.

    Of an image model the offline labels are words of the captions of the images on which a feature
    fires, and where in the image: '"red", "crimson" at the top left'.

    Example: lorgnette label artifacts/saes/smollm2-resid_post.12-topk32-4608-1a2b3c4d

    Or with a model: lorgnette label SAE --method endpoint --endpoint http://127.0.0.1:8000/v1
    --endpoint-model NAME --features 3 14 15
    """

    sae: Annotated[Positional[Path], arg(metavar="SAE")]
    """Folder of a trained SAE with a feature index."""
    method: Method = "offline"
    """Where labels come from."""
    file: Path | None = None
    """The file, for --method file."""
    endpoint: str | None = None
    """Base address of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."""
    endpoint_model: str | None = None
    """Name of the model there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; nothing is sent where it is not set."""
    parallel: int = 4
    """Requests to the endpoint under way at once."""
    features: tuple[int, ...] = ()
    """Label only these; all living features where none is named. For --method endpoint."""
    store: Path | None = None
    """Store that the index was made from; the one the SAE was trained on where none is named."""
    labels: LabelConfig = field(default_factory=LabelConfig)
    device: str = "auto"
    """auto, cpu, cuda, ...: where the pool of sequences is encoded."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Label, or say what labelling would take; gives the folder of the labels."""
    sae_run = find_run(command.sae, "sae", command.common.root)
    weights_hash(sae_run)
    index = FeatureIndex.open(index_of(sae_run).path)
    endpoint = named_endpoint(command)
    if index.of_images and endpoint is not None:
        raise UserError(
            f"{index.path} is of images, which cannot be shown to an endpoint; use --method "
            "offline, or --method file without an endpoint."
        )
    features = wanted_features(command, index)
    given = (
        read_label_file(command.file, index.n_features)
        if command.method == "file" and command.file
        else None
    )
    if command.common.dry_run:
        n = len(given) if given is not None else len(features)
        say(dry_run_plan(command, index, n))
        return None
    made = label(command, sae_run, index, endpoint, features, given)
    say(summary_table(made))
    return made.path


def label(
    command: Command,
    sae_run: Run,
    index: FeatureIndex,
    endpoint: Endpoint | None,
    features: list[int],
    given: dict[int, str] | None,
) -> Run:
    """Fill the folder of the labels, or find it filled."""
    source = {"endpoint": endpoint and endpoint.run_config()}
    if command.method == "file" and command.file is not None:
        source |= {"file": command.file.name, "sha256": sha256_file(command.file)}
    if command.features:
        source |= {"features": sorted(set(command.features))}
    config = command.labels.run_config(
        index=manifest_hash(index.run), method=command.method, source=source
    )
    folder = Run.create(sae_run.path, KIND, config)
    if folder.complete:
        return folder
    with folder.lock():
        device = resolve_device(command.device)
        if index.of_images and command.method == "offline":
            table = image_labels(make_image_subject(command, sae_run, index))
        elif index.of_images:
            assert given is not None, "checked before"
            table = unscored_table(given, command.method)
        elif command.method == "offline":
            table = offline_labels(make_subject(command, sae_run, index))
        else:
            subject = make_subject(command, sae_run, index)
            answers = Answers(folder.path / ANSWERS) if endpoint else None
            if given is None:
                assert endpoint and answers, "checked before"
                given = endpoint_labels(subject, endpoint, answers, features)
            table = asked_table(subject, given, command.method, endpoint=endpoint, answers=answers)
        write_labels(folder, table, command.labels, device=str(device))
    return folder


def index_of(sae_run: Run) -> Run:
    """The SAE's newest complete index. Raises `UserError` where there is none."""
    index = newest_run(sae_run.path, "index")
    if index is None:
        raise UserError(
            f"{sae_run.path} has no complete feature index, which labels are made from; "
            f"run `lorgnette index {sae_run.path}` first."
        )
    return index


def named_endpoint(command: Command) -> Endpoint | None:
    """The endpoint that the options name; checks that the method has what it needs."""
    if command.method == "file" and command.file is None:
        raise UserError("--method file needs --file, a table with the columns feature and label.")
    if command.method != "file" and command.file is not None:
        raise UserError(f"--file goes with --method file; the method is {command.method}.")
    if command.method == "offline" and command.endpoint is not None:
        raise UserError("--endpoint goes with --method endpoint or file; the method is offline.")
    if (command.endpoint is None) != (command.endpoint_model is None):
        raise UserError("--endpoint (an address) and --endpoint-model (a name) go together.")
    if command.endpoint is None or command.endpoint_model is None:
        if command.method == "endpoint":
            raise UserError(
                "--method endpoint needs --endpoint (an address such as http://127.0.0.1:8000/v1) "
                "and --endpoint-model; `--method offline` needs neither."
            )
        return None
    return Endpoint(
        url=command.endpoint, model=command.endpoint_model, key_variable=command.key_variable,
        parallel=command.parallel,
    )  # fmt: skip


def wanted_features(command: Command, index: FeatureIndex) -> list[int]:
    """The living features to label. Raises `UserError` for one that does not exist or is dead."""
    numbers = index.numbers()
    living = numbers["feature"][numbers["alive"]].tolist()
    if not command.features:
        return living
    if command.method != "endpoint":
        raise UserError("--features goes with --method endpoint; the others label what there is.")
    wanted = sorted(set(command.features))
    unknown = sorted(set(wanted) - set(living))
    if unknown:
        raise UserError(
            f"only living features of 0 to {index.n_features - 1} can be labelled; got "
            f"{', '.join(map(str, unknown[:5]))}."
        )
    return wanted


def make_subject(command: Command, sae_run: Run, index: FeatureIndex) -> Subject:
    """Read what all features share, and encode the pool of sequences."""
    texts = Texts(index, command.labels.seed)
    return Subject(index, texts, command.labels, make_pool(command, sae_run, index, texts))


def make_image_subject(command: Command, sae_run: Run, index: FeatureIndex) -> ImageSubject:
    """The same of images, whose prompts are the store's where there is a pool."""
    prompts = None
    if command.labels.pool_sequences:
        prompts = labels_store(command, sae_run, index).prompts()
    images = Images(index, command.labels.seed, prompts)
    pool = make_pool(command, sae_run, index, images)
    return ImageSubject(index, images, command.labels, pool)


def make_pool(command: Command, sae_run: Run, index: FeatureIndex, texts: Sequences) -> Pool | None:
    """The pool, where one is wanted. Raises `UserError` where the store is not the index's."""
    if command.labels.pool_sequences == 0:
        return None
    store = labels_store(command, sae_run, index)
    sae = load_sae(sae_run.path).to(resolve_device(command.device))
    return encode_pool(texts, sae, store, index.run.config["site"], command.labels.pool_sequences)


def labels_store(command: Command, sae_run: Run, index: FeatureIndex) -> ActivationStore:
    """The index's store. Raises `UserError` where it is not there, or is another one."""
    try:
        store = store_of(sae_run, command.common.root, command.store)
    except UserError as error:
        raise UserError(
            f"{str(error).rstrip('.')}; or do without one: --pool-sequences 0."
        ) from error
    if manifest_hash(store.run) != index.run.config["store"]:
        raise UserError(
            f"the index {index.path} was made from another store than {store.run.path}; name that "
            "one with --store, or do without: --pool-sequences 0."
        )
    return store


def dry_run_plan(command: Command, index: FeatureIndex, n: int) -> Table:
    """How many labels, from what, in what time."""
    rows = {
        "features": f"{n} of {index.n_features}",
        "index": str(index.path),
        "encoded again": f"{2 * command.labels.pool_sequences} sequences",
    }
    if command.method == "offline":
        rows["time"] = f"about {n * SECONDS_A_FEATURE:.0f} s on one core"
    if command.endpoint is not None:
        requests = (3 if command.method == "endpoint" else 2) * n
        rows["requests"] = f"{requests} to {command.endpoint}"
    return plan(f"lorgnette label ({command.method}) would label", rows)


def summary_table(run: Run) -> Table:
    """How many labels there are and how good they are."""
    found = run.summary
    rows = {"labelled": str(found["n_labelled"]), "scored": str(found["n_scored"])}
    if found["n_scored"]:
        control = found["control"]
        rows |= {
            "median score": f"{found['median']:.3f} (0.5 is chance)",
            "with other features' labels": "-" if control is None else f"{control:.3f}",
            "interval above 0.5": f"{found['clear']:.1%}",
        }
        rows |= {f"above {bound}": f"{found[f'above_{bound}']:.1%}" for bound in (0.7, 0.8, 0.9)}
    return plan("Labels and their detection scores on held-out contexts", rows)
