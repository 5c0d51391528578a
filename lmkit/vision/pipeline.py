"""A diffusion model as a directory in the layout of diffusers, each part loadable by the library it is from.

    unet/ or transformer/         the network; unet/ loads by diffusers' UNet2DConditionModel or UNet2DModel
    scheduler/                    of diffusers: DDPMScheduler (eps, v) or FlowMatchEulerDiscreteScheduler (flow)
    text_encoder/, tokenizer/     with captions; they load by AutoModel and AutoTokenizer
    preprocess.json               how pixels become the network's numbers
    diffusion.json                the condition, its classes, how the model is sampled
    model_index.json              only where a pipeline of diffusers does the whole: U-Net, eps or v, no condition

No pipeline of diffusers joins a text encoder of lmkit's kind to a network on pixels, and none passes classes to a
U-Net, so for those `DiffusionPipeline.from_pretrained` has nothing to load; transformer/ needs this package.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from lmkit.artifact import write_json
from lmkit.config import validate
from lmkit.errors import BadInput
from lmkit.model_files import check_model_files
from lmkit.vision.conditioning import Captions, Classes, Conditioner, Unconditional
from lmkit.vision.denoiser import Denoiser
from lmkit.vision.diffusion_options import DiffusionRecord, SamplingOptions
from lmkit.vision.dit import DiT
from lmkit.vision.options import Preprocess

FILE = "diffusion.json"


def save_pipeline(folder: Path, denoiser: Denoiser, sampling: SamplingOptions) -> None:
    """Writes all parts of a trained model."""
    network, conditioner, folder = denoiser.network, denoiser.conditioner, Path(folder)
    network.save_pretrained(folder / _part(network))
    scheduler = _scheduler(denoiser)
    scheduler.save_pretrained(folder / "scheduler")
    if conditioner.kind == "text":
        conditioner.encoder.save_pretrained(folder / "text_encoder")
        conditioner.tokenizer.save_pretrained(folder / "tokenizer")
    denoiser.preprocess.save(folder)
    record = DiffusionRecord(
        process=denoiser.process,
        condition=conditioner.kind,
        classes=conditioner.names if conditioner.kind == "class" else [],
        drop_condition=denoiser.drop_condition,
        sampling=sampling,
    )
    write_json(folder / FILE, record.model_dump())
    if conditioner.kind == "none" and _part(network) == "unet" and denoiser.process.objective != "flow":
        from diffusers import DDPMPipeline

        DDPMPipeline(unet=network, scheduler=scheduler).save_config(folder)


def _part(network: nn.Module) -> str:
    return "transformer" if isinstance(network, DiT) else "unet"


def _scheduler(denoiser):
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    process, preprocess, num_levels = denoiser.process, denoiser.preprocess, len(denoiser.schedule)
    if process.schedule == "straight":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_levels)
    ends = [abs(end - mean) / std for mean, std in zip(preprocess.mean, preprocess.std) for end in (0, 1)]
    return DDPMScheduler(
        num_train_timesteps=num_levels,
        beta_start=0.1 / num_levels,
        beta_end=20 / num_levels,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[process.schedule],
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[process.objective],
        clip_sample=process.objective == "eps",
        clip_sample_range=max(ends),
        timestep_spacing="trailing",
    )


def load_pipeline(folder: Path) -> tuple[Denoiser, SamplingOptions]:
    """(the model in eval mode, how it is sampled). Raises BadInput when a part is missing or another."""
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise BadInput(f"{folder} has no {FILE}; wanted a directory that recipes/vision/diffusion.py wrote.")
    for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        check_model_files(part)
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{folder / FILE} is not readable JSON ({error}). Make the model again.") from None
    record, preprocess = validate(DiffusionRecord, content, str(folder / FILE)), Preprocess.load(folder)
    try:
        conditioner = _load_conditioner(folder, record)
        network = _load_network(folder, conditioner)
    except BadInput:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # weights that are missing, or of other sizes than config.json
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{folder} is not whole: {reason} Make the model again.") from None
    return Denoiser(network, conditioner, record.process, preprocess, record.drop_condition).eval(), record.sampling


def _load_conditioner(folder: Path, record: DiffusionRecord) -> Conditioner:
    if record.condition != "text":
        return Classes(record.classes) if record.condition == "class" else Unconditional()
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise BadInput(f"{folder} has no {part}/, which a model with captions needs. Make the model again.")
    encoder = AutoModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.float32)
    return Captions(AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), encoder)


def _load_network(folder: Path, conditioner: Conditioner) -> nn.Module:
    if (folder / "transformer").is_dir():
        return DiT.from_pretrained(folder / "transformer", local_files_only=True, dtype=torch.float32)
    if not (folder / "unet").is_dir():
        raise BadInput(f"{folder} has neither unet/ nor transformer/, the network. Make the model again.")
    try:
        from diffusers import UNet2DConditionModel, UNet2DModel
    except ImportError:
        raise BadInput(f"{folder / 'unet'} needs diffusers: pip install -e '.[vision]'.") from None
    kind = UNet2DConditionModel if conditioner.kind == "text" else UNet2DModel
    return kind.from_pretrained(folder / "unet", local_files_only=True, use_safetensors=True)
