"""Completions of the policy: by lmkit's own sampler or by vLLM, as they are wanted or one iteration ahead of it.

One step off-policy (Noukhovitch et al., arXiv:2410.18252), the completions of iteration t + 1 are drawn by the weights
that iteration t starts with, so that a vLLM server draws them while t scores and learns. They are then one iteration
old: PPO recomputes their log-probabilities and weighs each token by policy over sampler (`importance_sampling_cap`).
"""

from collections.abc import Callable

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.generation.sampler import Completions, sample
from lmkit.generation.vllm import VLLMSampler
from lmkit.generation.vllm_server import VLLMServer
from lmkit.rl.config import PPOConfig
from lmkit.rl.plan import Plan
from lmkit.rl.shares import gathered


class Drawing:
    """Draws completions of `policy`, whose weights have to be whole here and wherever it is called.

    ahead: completions of the next iteration, of all processes, where they are drawn already; None: they are not. With
    the weights they were drawn by gone, a checkpoint has to hold them.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: list[int],
        args: PPOConfig,
        plan: Plan,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ):
        self.policy, self.args, self.plan, self.accelerator = policy, args, plan, accelerator
        self.options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        self.options |= {"stop_token_ids": stop_token_ids, "stop_strings": args.stop_strings, "tokenizer": tokenizer}
        self.options["batch_size"] = args.generation_batch_size
        self.sample, self.start = sample, None
        if args.use_vllm and args.vllm_mode == "server":
            address = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
            options = {"timeout": args.vllm_server_timeout, "group_port": args.vllm_group_port, "say": say}
            self.start = VLLMServer(policy, base_url=address, **options).start
        elif args.use_vllm:
            options = {"gpu_memory_utilization": args.vllm_gpu_memory_utilization, "sleep": args.vllm_enable_sleep_mode}
            self.sample = VLLMSampler(policy, tokenizer, **options).sample
        self.ahead: Completions | None = None
        self.under_way: Callable[[], Completions] | None = None

    def __call__(
        self,
        prompts: list[list[int]],
        purpose: str,
        iteration: int,
        first: int,
        model: PreTrainedModel | None = None,
    ) -> Completions:
        """A completion of the policy (or `model`) for each prompt of ids; purpose and iteration seed the sampling.

        first: the number of the first prompt among those of all processes, so that its draws are those of one process.
        All processes call it.
        """
        return self._start(prompts, purpose, iteration, first, model)()

    def one_ahead(self, prompts: list[list[int]], iteration: int) -> Completions:
        """This process's completions in an iteration, drawn in the one before; now those of the next are begun.

        prompts: ids of the whole data set. In the first iteration of all nothing is drawn yet, and it draws its own.
        """
        own = self.plan.part(self.args.rollout_batch_size)

        def start(iteration: int) -> Callable[[], Completions]:
            rows = self.plan.rows(iteration, len(prompts))[own.start : own.stop]
            return self._start([prompts[row] for row in rows], "sampling", iteration, own.start)

        drawn = start(iteration)() if self.ahead is None else self.ahead.rows(own)
        if iteration + 1 < self.args.num_iterations:
            self.under_way = start(iteration + 1)
        return drawn

    def land(self) -> None:
        """Waits for the completions that `one_ahead` began; all processes call it."""
        under_way, self.under_way = self.under_way, None
        self.ahead = None if under_way is None else gathered(under_way(), self.accelerator)

    def _start(self, prompts, purpose, iteration, first, model=None) -> Callable[[], Completions]:
        generator = self.plan.generator(purpose, iteration, skip=first * self.args.max_new_tokens)
        given = (self.policy if model is None else model, prompts)
        with self.accelerator.autocast():
            if self.start is not None:
                return self.start(*given, generator=generator, **self.options)
            drawn = self.sample(*given, generator=generator, **self.options)
        return lambda: drawn
