"""LoRA: one frozen base in memory for the policy, the reference, the critic and a reward model that is an adapter.

The adapters lie inside the base's own layers, so the policy stays the stock class it was. Which of them acts is a state
of those layers: the policy's unless `acting` says otherwise, and with none of them the base is the reference.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lmkit.errors import BadInput

POLICY, VALUE, REWARD = "policy", "value", "reward"  # names of the adapters
KEEP_THE_BASE = (True, False, "gaussian")  # of peft's initialisations, those that leave its weights alone


def add_adapters(model: PreTrainedModel, peft_config: LoraConfig, *, own_critic: bool) -> PeftModel:
    """Freezes `model` and puts a trainable adapter for the policy into it, and one for the critic if `own_critic`."""
    if not isinstance(peft_config, LoraConfig):
        raise BadInput(f"peft_config is {type(peft_config).__name__}; wanted a peft.LoraConfig.")
    if peft_config.modules_to_save:
        raise BadInput(
            f"peft_config has modules_to_save {list(peft_config.modules_to_save)}, which the reference would share "
            "with the policy; put these modules into target_modules instead."
        )
    if peft_config.bias != "none" or peft_config.init_lora_weights not in KEEP_THE_BASE:
        raise BadInput(
            f"peft_config has bias {peft_config.bias} and init_lora_weights {peft_config.init_lora_weights}; wanted "
            f"bias none and one of {', '.join(map(str, KEEP_THE_BASE))}: others move the base, which is the reference."
        )
    lora = get_peft_model(model, peft_config, adapter_name=POLICY)
    if own_critic:
        lora.add_adapter(VALUE, peft_config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or f".{VALUE}." in name)
    return lora


@contextlib.contextmanager
def acting(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Inside the block the named adapter acts in `model`; None: the frozen base alone. Nothing else changes.

    peft's own switches also turn gradients of adapters on and off, which would cut the policy's off while the critic's
    acts, and confuse DistributedDataParallel.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [adapter], adapter is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before):
            layer._active_adapter, layer._disable_adapters = active, disabled


def merged(lora: PeftModel, adapter: str) -> PreTrainedModel:
    """A plain copy of the base with an adapter's weights added into its own."""
    return copy.deepcopy(lora).merge_and_unload(adapter_names=[adapter])


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds a peft adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def adapter_classifier(lora: PeftModel, directory: Path) -> PreTrainedModel:
    """A reward model that is an adapter of the same base, without a second copy of the base.

    Its scores are those of the reward model inside `acting(classifier, REWARD)`. Raises BadInput when the adapter was
    trained on another base.
    """
    directory, policy = Path(directory), lora.get_base_model()
    config = PeftConfig.from_pretrained(directory)
    trained_on, own = config.base_model_name_or_path or "", policy.name_or_path
    if trained_on != own and Path(trained_on).resolve() != Path(own).resolve():
        raise BadInput(
            f"{directory} is an adapter of {trained_on or 'an unnamed model'}, and the policy's base is "
            f"{own or 'an unnamed model'}; its scores would mean nothing. Give a reward adapter of the policy's base, "
            "or a whole reward model."
        )
    config.modules_to_save = config.task_type = None  # the head is ours to place
    lora.add_adapter(REWARD, config)
    weights = load_peft_weights(str(directory))
    heads = [weights.pop(name) for name in [*weights] if name.endswith("score.weight")]
    if len(heads) != 1 or heads[0].shape[0] != 1:
        raise BadInput(f"{directory} holds no head score.weight [1, width]; it is not an adapter of a reward model.")
    set_peft_model_state_dict(lora, weights, REWARD)
    shape = copy.deepcopy(policy.config)
    shape.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(shape)
    setattr(classifier, classifier.base_model_prefix, policy.base_model)
    classifier.score = nn.Linear(heads[0].shape[1], 1, bias=False, device=policy.device)
    classifier.score.weight = nn.Parameter(heads[0].to(policy.device).float(), requires_grad=False)
    return classifier.eval()
