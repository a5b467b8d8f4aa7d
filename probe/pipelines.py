"""Where text-to-image pipelines come from.

    sdxl-turbo      stabilityai/sdxl-turbo
    sdxl-base       stabilityai/stable-diffusion-xl-base-1.0
    toy-turbo       the project's own small model of the same architecture, which draws a world of
                    known factors (`probe.toyturbo`); in `artifacts/models`
    a folder        in diffusers' format: a model_index.json of a StableDiffusionXLPipeline
    org/name        any such pipeline of the Hugging Face hub; local copies first

`random_weights=SEED` gives the U-Net fresh weights: the control twin. Text encoders and the
decoder keep theirs, since without them neither prompt nor image would mean anything.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from probe.diffusion import DiffusionModel
from probe.errors import Failure, UserError
from probe.runs import read_json

TOY_TURBO = "toy-turbo"
HUB_IDS = {
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sdxl-base": "stabilityai/stable-diffusion-xl-base-1.0",
}
MODELS_ROOT = Path(__file__).resolve().parent.parent / "artifacts" / "models"
INDEX = "model_index.json"
CLASS = "StableDiffusionXLPipeline"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def is_pipeline(spec: str) -> bool:
    """Whether a model's name means an image model; asks the hub about ids that are not here."""
    if spec == TOY_TURBO or spec in HUB_IDS:
        return True
    if Path(spec).exists():
        return (Path(spec) / INDEX).is_file()
    if spec.count("/") != 1:
        return False
    if isinstance(try_to_load_from_cache(spec, "config.json"), str):
        return False
    if isinstance(try_to_load_from_cache(spec, INDEX), str):
        return True
    with contextlib.suppress(OSError, ValueError, HTTPError):
        files = HfApi().model_info(spec, timeout=10).siblings or []
        return any(file.rfilename == INDEX for file in files)
    return False


def pipeline_folder(spec: str) -> str:
    """The folder or hub id of an image model.

    Raises `UserError` where it is not an SDXL pipeline, or toy-turbo has not been made.
    """
    if spec == TOY_TURBO:
        return str(toy_turbo_folder())
    if Path(spec).is_dir():
        found = read_json(Path(spec) / INDEX)
        name = found.get("_class_name") if isinstance(found, dict) else None
        if name != CLASS:
            raise UserError(f"{spec} is a pipeline of class {name} where {CLASS} was wanted.")
    return HUB_IDS.get(spec, spec)


def toy_turbo_folder() -> Path:
    """Where toy-turbo is. Raises `UserError` where it has not been made."""
    made = [path.parent for path in sorted(MODELS_ROOT.glob(f"{TOY_TURBO}-*/manifest.json"))]
    if not made:
        raise UserError(
            f"{TOY_TURBO} is not in {MODELS_ROOT}; make it with `lorgnette make {TOY_TURBO}`."
        )
    return made[-1]


def load_pipeline(
    spec: str, *, dtype: torch.dtype, device: torch.device, random_weights: int | None = None
) -> DiffusionModel:
    """Load an image model; see `probe.models.load_model`, which says what it raises."""
    pipeline = _pretrained(spec, pipeline_folder(spec), dtype)
    if random_weights is not None:
        pipeline.unet = make_random_unet(pipeline.unet.config, random_weights, dtype)
    return DiffusionModel(spec, pipeline.to(device), random_weights)


def make_random_unet(config: Any, seed: int, dtype: torch.dtype) -> Any:
    """A U-Net of the given configuration with freshly initialised weights, drawn in fp32."""
    network = import_diffusers().UNet2DConditionModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network.from_config(config).to(dtype)


def import_diffusers() -> Any:
    """The library, asked for its pipeline so that what it warns of meanwhile is not shown.

    Imported where it is used, since it takes long. Its warnings are of packages that are not used
    here and of truncated prompts, which are counted and said once.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    assert diffusers.StableDiffusionXLPipeline
    transformers_logging.set_verbosity(verbosity)
    return diffusers


def _pretrained(spec: str, folder: str, dtype: torch.dtype) -> Any:
    """The pipeline, from local files where they are there, else from the hub."""
    pipeline = import_diffusers().StableDiffusionXLPipeline
    # Half-precision files hold all that a half-precision model takes; some copies have no others.
    variants = [None, "fp16"] if dtype == torch.float32 else ["fp16", None]
    options: dict[str, Any] = {"dtype": dtype, "add_watermarker": False}
    for variant in variants:
        with contextlib.suppress(OSError, ValueError, SafetensorError, HTTPError):
            return pipeline.from_pretrained(
                folder, variant=variant, local_files_only=True, **options
            )
    if Path(folder).is_dir():
        raise Failure(
            f"{folder} does not load as a {CLASS}: its files are missing or damaged; put the "
            "model's own folders (unet, vae, text encoders, tokenizers, scheduler) there."
        )
    try:
        # One question first: a download that cannot be reached retries for a minute.
        files = [file.rfilename for file in HfApi().model_info(folder, timeout=10).siblings or []]
        variant = "fp16" if any(".fp16." in name for name in files) else None
        return pipeline.from_pretrained(
            folder, variant=variant if dtype != torch.float32 else None, **options
        )
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"model {spec!r} is not known: wanted {TOY_TURBO}, {', '.join(HUB_IDS)}, a local "
            f"folder with a {INDEX}, or the id of a {CLASS} that the hub can be asked for from "
            "here."
        ) from error
