"""Policy and critic as one module: log-probabilities, values and entropies of completion tokens, in one forward.

Scoring and training call the same function on the same rows, so that the first mini-batch of an iteration has ratio 1.
Rows are right-padded, positions count from 0 and no attention mask is needed: no real token of a causal model sees what
follows it. Logits are made at completion tokens alone.

Shapes: B rows, T tokens, N counted completion tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmkit.errors import BadInput
from lmkit.models.heads import ValueHead, token_scores
from lmkit.rl.lora import acting


class ActorCritic(nn.Module):
    """A causal language model with a critic: a value head on its backbone, or a sequence-classification model.

    critic: None where no values are wanted; they are 0 then.
    value_adapter: name of the LoRA adapter of the policy's backbone that acts under the value head; None: the policy's.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: ValueHead | PreTrainedModel | None = None,
        value_adapter: str | None = None,
    ):
        super().__init__()
        self.policy, self.critic, self.value_adapter = policy, critic, value_adapter

    def forward(
        self,
        input_ids: Tensor,
        before: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        with_values: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability, value before and entropy at each target token: float32 [N] each, row after row.

        input_ids: [B, T]. before: bool [B, T], True at the N positions whose next token is a target. targets: [N].
        """
        hidden = _hidden(self.policy, input_ids, before)
        logprobs, entropies = _logprobs(self.policy, hidden, targets, temperature, with_entropy)
        if self.critic is None or not with_values:
            values = torch.zeros_like(logprobs)
        elif isinstance(self.critic, ValueHead):
            if self.value_adapter is not None:
                with acting(self.policy, self.value_adapter):
                    hidden = _hidden(self.policy, input_ids, before)
            values = self.critic(hidden)
        else:
            values = token_scores(self.critic, input_ids)[before]
        return logprobs, values, entropies

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The trainable parameters of the policy, and if there is a critic those that are its alone."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        own = [name.startswith("critic.") or f".{self.value_adapter}." in name for name, _ in named]
        groups = [[p for (_, p), critics in zip(named, own) if critics == flag] for flag in (False, True)]
        return groups if self.critic is not None else groups[:1]


def target_logprobs(
    policy: PreTrainedModel, input_ids: Tensor, before: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    """The log-probabilities of `ActorCritic.forward` for a model without a critic: the reference. float32 [N]."""
    return _logprobs(policy, _hidden(policy, input_ids, before), targets, temperature, with_entropy=False)[0]


def _hidden(policy, input_ids, before):
    return policy.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[before]


def _logprobs(policy, hidden, targets, temperature, with_entropy):
    logits = policy.get_output_embeddings()(hidden).float()
    distribution = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    entropies = -(distribution.exp() * distribution).sum(-1) if with_entropy else None
    return distribution.gather(1, targets[:, None]).squeeze(1), entropies


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: modules, and the float attributes that attention reads directly.

    Training mode stays usable (gradient checkpointing needs it) and two forwards agree to the bit.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            names = [n for n, v in vars(holder).items() if "dropout" in n and isinstance(v, float)] if holder else []
            for name in names:
                setattr(holder, name, 0.0)


@torch.no_grad()
def check_policy(policy: PreTrainedModel, name: str) -> None:
    """Raises BadInput unless the output layer on the backbone's last hidden states gives the model's own logits.

    A few architectures scale or cap their logits afterwards, and PPO would then optimise another distribution.
    """
    training = policy.training
    policy.eval()
    ids = torch.arange(4, device=policy.device)[None] % policy.config.get_text_config().vocab_size
    expected = policy(input_ids=ids, use_cache=False).logits
    output_layer = policy.get_output_embeddings()
    found = output_layer(policy.base_model(input_ids=ids, use_cache=False).last_hidden_state) if output_layer else None
    policy.train(training)
    if found is None or found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise BadInput(
            f"{name} is a {type(policy).__name__}, whose logits are not its output layer on the backbone's last hidden "
            "states (it scales or caps them), or which has no output layer; PPO needs a plain causal language model."
        )
