"""Sampling by a vLLM server on GPUs of its own, behind the interface of `lmkit.generation.sampler.sample`.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \
        --logprobs-mode processed_logprobs

TRL's client speaks to it. Before each rollout the main process sends the policy's whole weights, over NCCL; then every
process asks for the completions of its own prompts, over HTTP, a request for each with a seed of its own. `start` comes
back as soon as the weights are there, so that the caller can work while the server does.

Never run against vLLM: no GPU was at hand. The tests run this code and TRL's client against a server that speaks the
same HTTP, with a plain TCP connection in NCCL's place; see `tests/generation/vllm_standin.py`.
"""

import contextlib
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.generation.sampler import Completions, Stops
from lmkit.generation.vllm import padded, require_vllm, row_seeds

COMMAND = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve {} --weight-transfer-config \'{{"backend": "nccl"}}\' '
    "--logprobs-mode processed_logprobs"
)
WAIT_SECONDS = 2  # between two looks whether the server is up


class VLLMServer:
    """A server that has the architecture and tokenizer of `model`; all processes make one of these and call it alike.

    base_url: its address. timeout: seconds to wait for it to be up. group_port: of this machine, where the server's
    workers fetch the weights. say: takes lines meant for the user.

    Raises BadInput, with the command that starts the right server, where it cannot be reached, is of another version
    than the vLLM installed here, gives other log-probabilities, or does not take the model's weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        base_url: str,
        timeout: float = 240.0,
        group_port: int = 51216,
        say: Callable[[str], None] = print,
    ):
        require_vllm(model)
        from trl.generation.vllm_client import VLLMClient

        self.base_url, self.state = base_url.rstrip("/"), PartialState()
        self.command = COMMAND.format(model.name_or_path or "MODEL")
        self._wait(timeout, say)
        with self._asking("is not one to sample by"):
            self.client = VLLMClient(base_url=self.base_url, group_port=group_port)
            self._check()
            if self.state.is_main_process:
                self.client.init_communicator(device=model.device)
        self._send(model)

    def sample(self, model: PreTrainedModel, prompts: list[list[int]], **options: object) -> Completions:
        """One completion of `model`, as it is now, for each prompt of token ids; see `start`."""
        return self.start(model, prompts, **options)()

    def start(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_token_ids: list[int],
        temperature: float = 1.0,
        stop_strings: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        generator: torch.Generator,
        batch_size: int = 64,
    ) -> Callable[[], Completions]:
        """Sends the weights of `model` and asks for a completion of each prompt; calling the result waits for them.

        All processes call it, each with prompts of its own, and wait for what they started before. The options are
        those of `lmkit.generation.sampler.sample`; batch_size: requests under way at once.
        """
        self._send(model)
        # `ignore_eos` leaves it to stop_token_ids alone what ends a completion.
        more = {"stop_token_ids": stop_token_ids, "ignore_eos": True, "stop": list(stop_strings) or None}
        options = {"max_tokens": max_new_tokens, "temperature": temperature}

        def ask(prompt: list[int], seed: int) -> tuple[list[int], list[float]]:
            with self._asking("did not complete a prompt"):
                found = self.client.generate([prompt], generation_kwargs=more | {"seed": seed}, **options)
            names = ("completion_ids", "logprob_token_ids", "logprobs")
            ids, likeliest, logprobs = (found[name][0] for name in names)
            return ids, [dict(zip(*pair))[token] for token, *pair in zip(ids, likeliest, logprobs, strict=True)]

        seeds, executor = row_seeds(len(prompts), max_new_tokens, generator), ThreadPoolExecutor(batch_size)
        answers = [executor.submit(ask, *row) for row in zip(prompts, seeds, strict=True)]
        executor.shutdown(wait=False)
        stops = Stops(stop_token_ids, stop_strings, tokenizer)

        def finish() -> Completions:
            try:
                tokens, logprobs = map(list, zip(*(answer.result() for answer in answers)))
            except BadInput:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
            return padded(tokens, logprobs, [bool(stops.end(torch.tensor([ids]))) for ids in tokens])

        return finish

    def _send(self, model: PreTrainedModel) -> None:
        """Gives the server the model's present weights; tied ones once, under their first name."""
        self.state.wait_for_everyone()  # nobody waits for completions by the weights before
        if self.state.is_main_process:
            with self._asking("did not take the policy's weights; does it serve another model?"):
                self.client.update_model_params(model)
                self.client.reset_prefix_cache()  # what it holds was computed with the weights before
        self.state.wait_for_everyone()

    def _wait(self, timeout: float, say: Callable[[str], None]) -> None:
        """Comes back when the server is up; BadInput after `timeout` seconds."""
        end, told = time.monotonic() + timeout, False
        while True:
            try:
                with urllib.request.urlopen(f"{self.base_url}/health", timeout=10):
                    return
            except (OSError, ValueError) as error:
                found = getattr(error, "reason", None) or error
            if time.monotonic() >= end:
                raise BadInput(
                    f"the vLLM server at {self.base_url} was not up after {timeout:g} seconds ({found}). Start it with "
                    f"{self.command}, or set vllm_server_base_url to where it is."
                )
            if not told:
                say(f"waiting up to {timeout:g} seconds for the vLLM server at {self.base_url} ({found})")
                told = True
            time.sleep(min(WAIT_SECONDS, max(end - time.monotonic(), 0)))

    def _check(self) -> None:
        """BadInput unless the server is of the version installed here and its log-probabilities are PPO's."""
        import vllm

        version = self.client.session.get(f"{self.base_url}/version").json()["version"]
        if version != vllm.__version__:
            raise BadInput(
                f"the server has vLLM {version} and this environment {vllm.__version__}; the weights go from one to "
                "the other, so install the same in both"
            )
        mode = self.client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise BadInput(
                f"it gives {mode}, and PPO weighs tokens by those of the tempered distribution, processed_logprobs"
            )

    @contextlib.contextmanager
    def _asking(self, problem: str) -> Iterator[None]:
        """What goes wrong with the server inside, of whatever kind, is a BadInput with the command that starts it."""
        try:
            yield
        except Exception as error:  # TRL's client raises plain ones
            raise BadInput(
                f"the vLLM server at {self.base_url} {problem}: {str(error).rstrip('.')}. It is started with "
                f"{self.command}."
            ) from error
