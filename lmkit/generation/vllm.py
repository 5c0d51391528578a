"""Sampling by a vLLM engine in this process, behind the interface of `lmkit.generation.sampler.sample`.

The engine shares the GPU with the training: it sleeps between rollouts, and takes the policy's weights before each. Its
log-probabilities come from other kernels than the trainer's, so PPO recomputes them and weighs each token by the ratio
of the two (`importance_sampling_cap`). Not yet run on a GPU: written against the interface of vLLM 0.22 to 0.31, with
a stand-in for the engine in the tests.
"""

import importlib.util
import os
import socket
import tempfile
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.generation.sampler import Completions


class VLLMSampler:
    """A vLLM engine with the architecture and tokenizer of a model; one in each training process, each on its own GPU.

    gpu_memory_utilization: share of the GPU's memory for its weights and cache. sleep: give that memory back between
    rollouts. dtype: of its weights. Raises BadInput where vLLM is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        gpu_memory_utilization: float = 0.3,
        sleep: bool = True,
        dtype: str = "bfloat16",
    ):
        require_vllm(model)
        from vllm import LLM

        # The engine runs inside this process, as one that a launcher started; without a launcher it is told so.
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self.engine = LLM(
                model=folder,
                dtype=dtype,
                max_model_len=getattr(model.config, "max_position_embeddings", None),
                gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=sleep,
                distributed_executor_backend="external_launcher",
                logprobs_mode="processed_logprobs",  # of the tempered distribution, as ours are
                trust_remote_code=False,
            )
        self.sleep = sleep
        if sleep:
            self.engine.sleep(level=2)

    def sample(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_token_ids: list[int],
        temperature: float = 1.0,
        stop_strings: Sequence[str] = (),
        generator: torch.Generator,
        **_: object,
    ) -> Completions:
        """One completion of `model`, as it is now, for each prompt of token ids; see `lmkit.generation.sampler.sample`.

        `generator` gives each request its seed. The options of our sampler that vLLM decides itself are left unused.
        """
        from vllm import SamplingParams

        self._take(model)
        seeds = row_seeds(len(prompts), max_new_tokens, generator)
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0, "top_k": 0, "logprobs": 0}
        # `ignore_eos` leaves it to stop_token_ids alone what ends a completion.
        options |= {"stop_token_ids": stop_token_ids, "ignore_eos": True, "stop": list(stop_strings) or None}
        requests = [SamplingParams(seed=seed, detokenize=bool(stop_strings), **options) for seed in seeds]
        given = [{"prompt_token_ids": ids} for ids in prompts]
        drawn = [result.outputs[0] for result in self.engine.generate(given, requests, use_tqdm=False)]
        if self.sleep:
            self.engine.sleep(level=2)
        return padded(
            [list(one.token_ids) for one in drawn],
            [[at[i].logprob for i, at in zip(one.token_ids, one.logprobs)] for one in drawn],
            [one.finish_reason == "stop" for one in drawn],
        )

    def _take(self, model: PreTrainedModel) -> None:
        """Gives the engine the model's present weights; tied ones once, under their first name."""
        if self.sleep:
            self.engine.wake_up(tags=["weights"])
        worker = self.engine.llm_engine.model_executor.driver_worker
        worker.model_runner.model.load_weights((name, tensor.data) for name, tensor in model.named_parameters())
        self.engine.reset_prefix_cache()  # what it holds was computed with the weights before
        if self.sleep:
            self.engine.wake_up(tags=["kv_cache"])


def require_vllm(model: PreTrainedModel) -> None:
    """Raises BadInput where vLLM is not installed, or cannot know the model."""
    if type(model).__module__.startswith("lmkit."):
        raise BadInput(
            f"use_vllm: vLLM does not know {type(model).__name__}, which is lmkit's own. Leave use_vllm out: "
            "lmkit's own sampler runs everywhere."
        )
    if importlib.util.find_spec("vllm") is None:
        raise BadInput(
            "use_vllm is set and vLLM is not installed; it needs a GPU. Install it with pip install -e .[vllm], or "
            "leave use_vllm out: lmkit's own sampler runs everywhere."
        )


def row_seeds(num_rows: int, max_new_tokens: int, generator: torch.Generator) -> list[int]:
    """A seed for each row, out of the numbers that lmkit's own sampler would draw it with.

    So that a process which leaves out the numbers of the rows before its own has the seeds of one process.
    """
    # From 2^28 on torch would take two of the generator's numbers for each.
    return torch.randint(2**27, (num_rows, max_new_tokens), generator=generator)[:, 0].tolist()


def padded(tokens: list[list[int]], logprobs: list[list[float]], stopped: list[bool]) -> Completions:
    """Rows of different lengths as one table."""
    return Completions(
        pad_sequence([torch.tensor(ids) for ids in tokens], batch_first=True),
        torch.tensor([len(ids) for ids in tokens]),
        pad_sequence([torch.tensor(row) for row in logprobs], batch_first=True),
        ["stop" if flag else "length" for flag in stopped],
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
