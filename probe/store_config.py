"""What is captured: of a language model reading text, of an image model drawing."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from probe.diffusion import DrawConfig, Rows
from probe.errors import UserError
from probe.sites import parse_site

KIND, SCHEMA = "activations", 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DROP = {"position_0": True, "special_tokens": True}
IMAGES = "images"
MAX_POSITIONS = 2**15
MAX_SEED = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """What to capture of text; with the weights it decides every byte of the store."""

    model: dict[str, Any]
    """The model: `spec`, `random_weights` (seed or None) and `dtype`."""
    corpus: str
    """The text it reads, by the names of `probe.corpora`."""
    sites: tuple[str, ...]
    """Names of the sites to keep, all captured in one pass."""
    tokens: int = 1_000_000
    """Tokens to read, before any are dropped, rounded up to whole sequences; fewer where the corpus
    ends first."""
    context: int = 128
    """Length of a sequence, in tokens."""
    batch_sequences: int = 16
    """Sequences in one forward pass."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the values on disk."""
    max_norm: float = 10.0
    """Rows of a norm above so many times the site's median norm (over the first batch) are left
    out, at all sites, as attention sinks; 0 keeps every row."""
    shard_batches: int = 32
    """Batches in one shard: held in memory, and the most that a killed capture does again."""

    def __post_init__(self) -> None:
        _at_least_one(self, "tokens", "context", "batch_sequences", "shard_batches")
        if not self.max_norm >= 0:
            raise UserError(f"max_norm must be at least 0, got {self.max_norm}; 0 keeps every row.")
        if self.context > MAX_POSITIONS:
            raise UserError(f"context must be at most {MAX_POSITIONS} tokens, got {self.context}.")
        _check_sites_and_dtype(self)

    @property
    def n_sequences(self) -> int:
        """Sequences read; fewer where the corpus ends first."""
        return -(-self.tokens // self.context)

    @property
    def kept_positions(self) -> int:
        """The most rows of one sequence."""
        return max(self.context - 1, 0)

    def run_config(self) -> dict[str, Any]:
        """The run folder's `config.json`, every default spelled out."""
        fixed = {"kind": KIND, "schema": SCHEMA, "drop": DROP}
        return fixed | asdict(self) | {"sites": list(self.sites), "site_folders": self.folders()}

    @staticmethod
    def from_run_config(config: Mapping[str, Any]) -> "StoreConfig":
        """Read back what `run_config` gave. Raises `UserError` for another kind, schema or key."""
        fixed = {"kind": KIND, "schema": SCHEMA, "drop": DROP}
        return StoreConfig(**_own_values(StoreConfig, config, fixed))

    def folders(self) -> dict[str, str]:
        """Each site's folder name."""
        return site_folders(self.sites)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStoreConfig:
    """What to capture while images are drawn; with the weights it decides every byte.

    A sequence is one pass of the U-Net over one image, and its positions are the places of the
    sites' feature map, row by row (`position = token = y * width + x`). The passes of an image lie
    together, step by step. No row is left out for its norm: attention sinks, which are why text
    has such a rule, are of tokens that come first, and images have none.
    """

    model: dict[str, Any]
    """The model: `spec`, `random_weights` (seed or None) and `dtype`."""
    prompts: str
    """What is drawn, by the names of `probe.image_prompts`."""
    sites: tuple[str, ...]
    """Names of the sites to keep, all captured in one pass, all of one grid."""
    grid: tuple[int, int]
    """Height and width of the sites' feature maps; `probe.passes.common_grid` finds it."""
    height: int
    """Height of the images, in pixels."""
    width: int
    """Width of the images, in pixels."""
    images: int = 1000
    """Images to draw, one a prompt; fewer where the prompts end first."""
    steps: int = 1
    """Denoising steps; every one is kept."""
    guidance: float = 0.0
    """Scale of classifier-free guidance; at most 1 is without."""
    rows: Rows = "conditional"
    """Which of a guided pass's two rows are kept; of both, the unconditional one comes first."""
    seed: int = 0
    """Image number i is drawn from seed + i; decides the places and the built-in prompts too."""
    places: int = 0
    """Places kept of each pass, drawn anew for each image and step; 0 keeps all of them."""
    batch_images: int = 8
    """Images drawn together."""
    keep_images: int | None = None
    """How many of the first images are kept beside the activations; None for all of them."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the values on disk."""
    shard_batches: int = 16
    """Batches in one shard: held in memory, and the most that a killed capture does again."""

    def __post_init__(self) -> None:
        _at_least_one(self, "images", "batch_images", "shard_batches")
        _ = self.draw
        if self.rows != "conditional" and not self.draw.guided:
            raise UserError(
                f"{self.rows} rows were asked for and guidance is {self.guidance:g}, so there is "
                "no unconditional row; ask for guidance above 1 or for the conditional row."
            )
        if self.rows not in get_args(Rows):
            raise UserError(f"rows must be one of {', '.join(get_args(Rows))}, got {self.rows!r}.")
        if self.context > MAX_POSITIONS:
            raise UserError(
                f"a feature map may have {MAX_POSITIONS} places and this one has {self.context}; "
                "draw smaller images or choose a deeper site."
            )
        if not 0 <= self.places <= self.context:
            raise UserError(
                f"places must be from 0 (all) to the {self.context} of a feature map of "
                f"{self.grid[0]} x {self.grid[1]}, got {self.places}."
            )
        if self.keep_images is not None and self.keep_images < 0:
            raise UserError(f"keep_images must be at least 0, got {self.keep_images}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed must be from 0 to {MAX_SEED}, got {self.seed}.")
        _check_sites_and_dtype(self)

    @property
    def draw(self) -> DrawConfig:
        """How the images are drawn."""
        return DrawConfig(
            steps=self.steps, guidance=self.guidance, height=self.height, width=self.width
        )

    @property
    def passes_of_step(self) -> tuple[str, ...]:
        """What each of the kept passes of one step read, in order."""
        return ("unconditional", "conditional") if self.rows == "both" else (self.rows,)

    @property
    def passes_of_image(self) -> int:
        """Sequences that an image gives."""
        return self.steps * len(self.passes_of_step)

    @property
    def corpus(self) -> str:
        """What a store of text calls its text: the prompts."""
        return self.prompts

    @property
    def context(self) -> int:
        """Positions of a sequence: the places of a feature map."""
        return self.grid[0] * self.grid[1]

    @property
    def batch_sequences(self) -> int:
        """Sequences that one batch of images gives."""
        return self.batch_images * self.passes_of_image

    @property
    def n_sequences(self) -> int:
        """Passes kept; fewer where the prompts end first."""
        return self.images * self.passes_of_image

    @property
    def kept_positions(self) -> int:
        """Rows of one sequence."""
        return self.places or self.context

    @property
    def max_norm(self) -> float:
        """No row is left out for its norm."""
        return 0.0

    def run_config(self) -> dict[str, Any]:
        """The run folder's `config.json`, every default spelled out."""
        fixed = {"kind": KIND, "schema": SCHEMA, "modality": IMAGES}
        lists = {"sites": list(self.sites), "grid": list(self.grid)}
        return fixed | asdict(self) | lists | {"site_folders": self.folders()}

    @staticmethod
    def from_run_config(config: Mapping[str, Any]) -> "ImageStoreConfig":
        """Read back what `run_config` gave. Raises `UserError` for another kind, schema or key."""
        fixed = {"kind": KIND, "schema": SCHEMA, "modality": IMAGES}
        values = _own_values(ImageStoreConfig, config, fixed)
        values["grid"] = tuple(values["grid"])
        return ImageStoreConfig(**values)

    def folders(self) -> dict[str, str]:
        """Each site's folder name."""
        return site_folders(self.sites)


AnyStoreConfig = StoreConfig | ImageStoreConfig


def read_store_config(config: Mapping[str, Any]) -> AnyStoreConfig:
    """The config of a store of text or of images.

    Raises `UserError` for another kind, schema or key.
    """
    if config.get("modality") == IMAGES:
        return ImageStoreConfig.from_run_config(config)
    return StoreConfig.from_run_config(config)


def site_folders(sites: Sequence[str]) -> dict[str, str]:
    """Each site's folder name; two names that would fall together are numbered apart."""
    folders: dict[str, str] = {}
    for name in sites:
        base = parse_site(name).folder
        taken = {folder.lower() for folder in folders.values()}
        candidates = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
        folders[name] = next(folder for folder in candidates if folder.lower() not in taken)
    return folders


def _own_values(
    config_class: type, config: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a config's fields, once the rest of `config.json` is as it should be."""
    if config.get("kind") != KIND:
        raise UserError(
            f"a store of activations was wanted and this is a run of kind "
            f"{config.get('kind')!r}; give a folder that `lorgnette capture` wrote."
        )
    names = {field.name for field in fields(config_class)}
    as_written = all(config.get(name) == value for name, value in fixed.items())
    if not as_written or set(config) != {*names, *fixed, "site_folders"}:
        raise UserError(
            f"the store's config.json (schema {config.get('schema')!r}) is not one that this "
            f"version reads (schema {SCHEMA}); capture again, or use the version that wrote it."
        )
    values = {name: config[name] for name in names}
    values["sites"] = tuple(config["sites"])
    return values


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}.")


def _check_sites_and_dtype(config: Any) -> None:
    if config.dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}.")
    if not config.sites or len(set(config.sites)) < len(config.sites):
        raise UserError(f"sites must be one or more, each once; got {list(config.sites)}.")
