"""LoRA and QLoRA for TRL's trainers: small trained matrices beside frozen weights, added to them when training ends.

What a stage hands over is a plain model directory either way: nothing after it knows that there were adapters.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from lmkit.config import Config, setting
from lmkit.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoraOptions(Config):
    """Adapters of rank r (Hu et al. 2021, arXiv:2106.09685) under peft's names; none where r is empty."""

    r: int | None = setting(None, "rank of the adapters; empty: no adapters, every weight is trained", gt=0)
    lora_alpha: float = setting(32, "the adapters' product is scaled by lora_alpha / r", gt=0)
    lora_dropout: float = setting(0.0, "dropout of what the adapters read", ge=0, lt=1)
    target_modules: str | list[str] = setting("all-linear", "names of the layers to adapt")
    load_in_4bit: bool = setting(False, "QLoRA: frozen weights in 4 bits; needs a GPU and lmkit[qlora]")

    @model_validator(mode="after")
    def _frozen_weights_have_adapters(self) -> LoraOptions:
        if self.load_in_4bit and self.r is None:
            raise ValueError("load_in_4bit: weights in 4 bits cannot be trained. Give the adapters a rank, as in r: 16")
        return self


def peft_config(
    options: LoraOptions, task: Literal["CAUSAL_LM", "SEQ_CLS"], model: PreTrainedModel | None = None
) -> Any:
    """The `peft.LoraConfig` for a TRL trainer, None without adapters. The head of a reward model is trained whole.

    Raises BadInput for a recurrent `model`, whose cells are no linear layers.
    """
    if options.r is None:
        return None
    if model is not None and model.config.model_type == "lmkit_recurrent":
        raise BadInput(
            f"lora.r {options.r}: adapters go beside linear layers, and a recurrent model ({model.config.cell}) has "
            "none but its output. Leave lora out: all weights of a model this small can be trained."
        )
    from peft import LoraConfig

    head = ["score"] if task == "SEQ_CLS" else None
    kind = task if head or model is None or model.can_generate() else None  # peft's causal model must generate
    return LoraConfig(**options.model_dump(exclude={"load_in_4bit"}), task_type=kind, modules_to_save=head)


def quantization(options: LoraOptions) -> dict[str, Any]:
    """What `from_pretrained` needs to load the weights in 4 bits (Dettmers et al. 2023, arXiv:2305.14314), or nothing.

    Raises BadInput without a GPU or without bitsandbytes.
    """
    if not options.load_in_4bit:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise BadInput("lora.load_in_4bit needs a GPU, and found none. Leave it out: LoRA itself runs anywhere.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("lora.load_in_4bit needs bitsandbytes. Install it: pip install -e '.[qlora]'.")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    return {"quantization_config": four_bit, "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}}


def merged(model: Any, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The trained model as a plain one: a model without adapters itself, else `load()` with the adapters added to it.

    load: gives the model that training started from, in full precision, so that what is handed over is not rounded to
    the 4 bits that the frozen weights may have had while training.
    """
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return model
    adapted = get_peft_model(load(), model.peft_config["default"])
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(model))
    return adapted.merge_and_unload()
