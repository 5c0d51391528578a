"""A stand-in for a vLLM server, and for what TRL's client imports of vLLM, where neither runs.

The server speaks the HTTP that TRL's client asks of vLLM 0.31, refuses what it does not know, and samples with lmkit's
own sampler. Weights are announced by HTTP and then come as bytes over a TCP connection, in the announced order, where
vLLM has NCCL: order, names, types and the waiting of either side are tested by it, and nothing of NCCL is.
"""

import contextlib
import http.server
import json
import socket
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import torch

from lmkit.generation.sampler import sample

VERSION = "0.31.0"
ASKED = {"model", "prompt", "return_token_ids", "return_tokens_as_token_ids", "n", "repetition_penalty", "temperature"}
ASKED |= {"top_p", "top_k", "min_p", "max_tokens", "logprobs", "stop_token_ids", "ignore_eos", "stop", "seed"}
CLIENTS = ["trl.generation", "trl.generation.vllm_client", "trl.generation.vllm_generation"]


def trainer_init(init_info):
    """The trainer's end: it waits until the server has connected."""
    with socket.create_server((init_info["master_address"], init_info["master_port"])) as listener:
        connection = listener.accept()[0]
    return SimpleNamespace(group=SimpleNamespace(store=None, socket=connection), connection=connection)


def send_all(iterator, group, src, post_iter_func):
    for item in iterator:
        group.connection.sendall(bytes(post_iter_func(item).detach().contiguous().view(torch.uint8).numpy()))


MODULES = {
    "vllm": {"__version__": VERSION, "LLM": None, "RequestOutput": None, "SamplingParams": None},
    "vllm.sampling_params": {"StructuredOutputsParams": None},
    "vllm.utils": {},
    "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1"},
    "vllm.distributed": {},
    "vllm.distributed.weight_transfer": {},
    "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": trainer_init},
    "vllm.distributed.weight_transfer.packed_tensor": {"packed_nccl_broadcast_producer": send_all},
}


@contextlib.contextmanager
def installed(on_a_gpu=True):
    """Inside the block vLLM is there to import. on_a_gpu: TRL's client takes any device for a GPU."""
    before = {name: sys.modules.pop(name, None) for name in (*MODULES, *CLIENTS)}
    for name, contents in MODULES.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents, __spec__=SimpleNamespace(name=name), __path__=[])
    try:
        if on_a_gpu:
            from trl.generation.vllm_client import VLLMClient

            connect = VLLMClient.init_communicator
            VLLMClient.init_communicator = lambda self, device: connect(self, device="cuda")
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


class Server:
    """A server of a copy of `model` on a port of its own; `with Server(...) as server:` serves.

    before_completing: called before each completion; settings: over those of a server that was rightly started.
    requests: the bodies of what was asked for, by path.
    """

    def __init__(self, model, tokenizer=None, before_completing=lambda: None, **settings):
        self.model, self.tokenizer, self.before_completing = model.eval(), tokenizer, before_completing
        self.settings = {"version": VERSION, "logprobs_mode": "processed_logprobs", "dev_mode": True}
        self.settings |= {"weight_transfer_config": {"backend": "nccl"}, "room": 10**6} | settings
        self.requests, self.lock, self.completing, self.connection = {}, threading.Lock(), 0, None
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.group_port = free_port()

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        if self.connection is not None:
            self.connection.close()

    def _handler(server):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = self.path.split("?")[0]
                self.answer(server.get(path) if server.settings["dev_mode"] or path != "/server_info" else None)

            def do_POST(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else {}
                server.requests.setdefault(self.path, []).append(body)
                try:
                    self.answer(getattr(server, self.path.strip("/").replace("/", "_"))(body))
                except (Refused, AssertionError) as error:
                    self.answer({"error": repr(error)}, 400)

            def answer(self, content, status=200):
                text = json.dumps(content).encode()
                self.send_response(404 if content is None else status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        return Handler

    def get(self, path):
        configured = {"weight_transfer_config": self.settings["weight_transfer_config"]}
        configured["model_config"] = {"logprobs_mode": self.settings["logprobs_mode"]}
        return {
            "/health": {},
            "/version": {"version": self.settings["version"]},
            "/v1/models": {"data": [{"id": "the-model"}]},
            "/get_world_size": {"world_size": 1},
            "/server_info": {"vllm_config": configured},
        }.get(path)

    def init_weight_transfer_engine(self, body):
        info = body["init_info"]
        assert (info["rank_offset"], info["world_size"], info["packed"]) == (1, 2, True)
        for _ in range(500):
            with contextlib.suppress(ConnectionRefusedError):
                self.connection = socket.create_connection((info["master_address"], info["master_port"]))
                return {}
            time.sleep(0.01)
        raise Refused("no trainer to connect to")

    def start_weight_update(self, body):
        if self.completing:
            raise Refused("completions are under way")
        return {}

    def update_weights(self, body):
        own, info = dict(self.model.named_parameters()), body["update_info"]
        announced = list(zip(info["names"], info["dtype_names"], info["shapes"], strict=True))
        received = {}
        for name, dtype, shape in announced:
            wanted = torch.empty(shape, dtype=getattr(torch, dtype))
            content, size = bytearray(), wanted.numel() * wanted.element_size()
            while len(content) < size:
                content += self.connection.recv(min(1 << 20, size - len(content)))
            received[name] = torch.frombuffer(content, dtype=wanted.dtype).reshape(shape)
        for name, tensor in received.items():
            if name not in own or own[name].shape != tensor.shape:
                raise Refused(f"there is no {name} of shape {list(tensor.shape)}")
            own[name].data.copy_(tensor)
        assert received.keys() == own.keys()
        return {}

    def finish_weight_update(self, body):
        return {}

    def reset_prefix_cache(self, body):
        return {"success": True}

    def v1_completions(self, body):
        if body.keys() - ASKED:
            raise Refused(f"unknown: {sorted(body.keys() - ASKED)}")
        (prompt,) = body["prompt"]
        fixed = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1, "logprobs": 0}
        fixed |= {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
        assert {name: body[name] for name in fixed} == fixed
        if len(prompt) + body["max_tokens"] > self.settings["room"]:
            raise Refused(f"the context has {self.settings['room']} tokens")
        self.completing += 1
        try:
            self.before_completing()
            with self.lock:  # decoding changes the model's attention
                drawn = sample(
                    self.model,
                    [prompt],
                    max_new_tokens=body["max_tokens"],
                    stop_token_ids=body["stop_token_ids"],
                    temperature=body["temperature"],
                    stop_strings=body["stop"] or (),
                    tokenizer=self.tokenizer,
                    generator=torch.Generator().manual_seed(body["seed"]),
                )
        finally:
            self.completing -= 1
        ids, logprobs = drawn.ids(0), drawn.logprobs[0].tolist()
        tokens = [f"token_id:{i}" for i in ids]
        found = {"tokens": tokens, "token_logprobs": logprobs}
        found["top_logprobs"] = [{token: logprob} for token, logprob in zip(tokens, logprobs)]
        return {"choices": [{"prompt_token_ids": prompt, "token_ids": ids, "logprobs": found}]}


class Refused(Exception):
    """The server answers with this and 400."""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
