"""A GGUF file holds the model: transformers reads the same ids, logits and settings from it."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from typer.testing import CliRunner

from lmkit.cli import app
from lmkit.errors import BadInput
from lmkit.models.gguf_file import write_gguf
from lmkit.models.load import load_language_model
from lmkit.models.presets import ModelConfig, build_model
from lmkit.tokenization.train import train_tokenizer

TEXT = "The old owl had 1234 drums, didn't it?  \n\n\tLa caf\u00e9 \u4e2d\u6587 \U0001f600 -- e\u0301 e\u0301 the end"


def save(folder: Path, arch: str = "qwen3", vocab_rows: int | None = None, **options) -> Path:
    """A small model directory whose weights and heads are unlike enough to be told apart."""
    options = {"split": "qwen2"} | options
    tokenizer = train_tokenizer(lambda: [TEXT] * 3, vocab_size=384, allow_smaller_vocab=True, **options)
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="nano", arch=arch, context_length=64), tokenizer)
    model.get_input_embeddings().weight.data.normal_(std=0.5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    if vocab_rows:
        model.resize_token_embeddings(vocab_rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "qwen3")


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


@pytest.mark.parametrize(("arch", "split"), [("qwen3", "qwen2"), ("llama", "gpt2"), ("llama", "llama3")])
def test_transformers_reads_equal_ids_and_logits(arch, split, tmp_path):
    folder = save(tmp_path / "model", arch, split=split)
    assert write_gguf(folder, tmp_path / "out" / "model.gguf") == []
    model, tokenizer = load_language_model(folder)
    where = {"pretrained_model_name_or_path": tmp_path / "out", "gguf_file": "model.gguf"}
    read_tokenizer = AutoTokenizer.from_pretrained(**where)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert read_tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    asked = [t.apply_chat_template(conversation, return_dict=False) for t in (tokenizer, read_tokenizer)]
    assert asked[0] == asked[1]
    # transformers does not read the width of a Qwen3 head, which is 128 unless told.
    config = {"config": Qwen3Config.from_pretrained(folder)} if arch == "qwen3" else {}
    read = AutoModelForCausalLM.from_pretrained(**where, **config, dtype=torch.float32)
    assert torch.equal(logits(read, ids), logits(model, ids))
    assert read_tokenizer.eos_token_id == tokenizer.eos_token_id != read_tokenizer.pad_token_id


def fields(file):
    reader = gguf.GGUFReader(file)
    return reader, {name: field.contents() for name, field in reader.fields.items()}


def test_what_llama_cpp_reads_of_a_tokenizer_and_its_sizes(qwen3, tmp_path):
    write_gguf(qwen3, tmp_path / "m.gguf")
    reader, found = fields(tmp_path / "m.gguf")
    wanted = {
        "general.architecture": "qwen3",
        "general.name": "qwen3",
        "qwen3.block_count": 2,
        "qwen3.context_length": 64,
        "qwen3.attention.head_count": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.vocab_size": 384,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2,  # a turn ends with <|im_end|>
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert "generation %}" not in found["tokenizer.chat_template"]
    assert found["tokenizer.ggml.token_type"][:4] == [gguf.TokenType.CONTROL] * 4
    assert found["tokenizer.ggml.token_type"][40] == gguf.TokenType.NORMAL
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}  # the embedding serves as output


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2)])
def test_smaller_types_round_the_matrices_and_leave_the_vectors(qwen3, tmp_path, dtype, tolerance):
    write_gguf(qwen3, tmp_path / "m.gguf", dtype)
    reader, found = fields(tmp_path / "m.gguf")
    assert found["general.file_type"] != 0
    weights = load_language_model(qwen3)[0].state_dict()
    for name, theirs in (("blk.1.ffn_up.weight", "mlp.up_proj"), ("blk.1.attn_norm.weight", "input_layernorm")):
        tensor = next(t for t in reader.tensors if t.name == name)
        read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        kept = weights[f"model.layers.1.{theirs}.weight"]
        if read.ndim == 1:
            assert torch.equal(read, kept)
        else:
            assert 0 < (read - kept).abs().max() < tolerance * kept.abs().max()


def test_rows_without_a_token_are_named_and_the_output_layer_is_kept(tmp_path):
    folder = save(tmp_path / "model", vocab_rows=400)
    model, tokenizer = load_language_model(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.save_pretrained(folder)
    write_gguf(folder, tmp_path / "m.gguf")
    reader, found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.tokens"][len(tokenizer) - 1 : len(tokenizer) + 1][1] == f"[PAD{len(tokenizer)}]"
    assert len(found["tokenizer.ggml.tokens"]) == 400
    output = next(t for t in reader.tensors if t.name == "output.weight")
    assert torch.equal(torch.from_numpy(output.data.copy()), model.lm_head.weight)


def test_a_tokenizer_that_normalises_is_exported_with_a_note(tmp_path):
    notes = write_gguf(save(tmp_path / "model", nfc=True), tmp_path / "m.gguf")
    assert len(notes) == 1
    assert "NFC" in notes[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "gpt2"}, "is a gpt2 model; GGUF export knows llama and qwen3"),
        ({"split": "gpt4"}, "llama.cpp does not cut text as the tokenizer of"),
    ],
)
def test_what_llama_cpp_would_get_wrong_is_refused(tmp_path, options, words):
    with pytest.raises(BadInput, match=words):
        write_gguf(save(tmp_path / "model", **options), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_settings_that_are_not_written_are_refused(qwen3, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((qwen3 / name).read_bytes())
    config = json.loads((qwen3 / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"rope_parameters.rope_type 'linear' \(wanted 'default'\)"):
        write_gguf(tmp_path, tmp_path / "m.gguf")


def test_merges_that_do_not_reach_a_token_are_refused_where_llama_cpp_looks_words_up(tmp_path):
    folder = save(tmp_path / "model", split="llama3")
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    lost = next(token for token in reversed(vocab) if len(token) > 3 and token.isalpha())
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != lost]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(BadInput, match="do not reach its tokens"):
        write_gguf(folder, tmp_path / "m.gguf")


def test_the_command(qwen3, tmp_path):
    def lmkit(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        return result.exit_code, " ".join(result.output.split())

    code, output = lmkit("export", qwen3, "--gguf", tmp_path / "m.gguf", "--dtype", "f16")
    assert (code, (tmp_path / "m.gguf").is_file()) == (0, True)
    assert "with f16 matrices" in output
    code, output = lmkit("export", tmp_path, "--gguf", tmp_path / "n.gguf")
    assert (code, "has no model that talks" in output) == (2, True)
    assert lmkit("export", qwen3, "--gguf", tmp_path / "n.gguf", "--dtype", "f8")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "split"), [("qwen3", "qwen2"), ("llama", "llama3"), ("llama", "gpt2")])
def test_llama_cpp_reads_equal_ids_and_logprobs(arch, split, tmp_path):
    reason = "llama.cpp is not installed: pip install xllamacpp, a wheel of it, in an environment of its own"
    llama_cpp = pytest.importorskip("xllamacpp", reason=reason)
    folder = save(tmp_path / "model", arch, split=split)
    write_gguf(folder, tmp_path / "m.gguf")
    model, tokenizer = load_language_model(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    wanted = logits(model, ids)[0].log_softmax(-1)
    options = llama_cpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(tmp_path / "m.gguf"), 64, 1
    options.cpuparams.n_threads = 1
    options.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    options.cache_type_k = options.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    server = llama_cpp.Server(options)

    def next_token(prompt):
        """(prompt tokens, id -> log-probability of the most likely next ones)."""
        asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 5, "cache_prompt": False}
        answers = []
        server.handle_completions(asked, answers.append)
        answer = json.loads(answers[-1]) if isinstance(answers[-1], str | bytes) else answers[-1]
        # There are none for a token that is no text of its own: a special one, or a part of a character.
        content = (answer["choices"][0]["logprobs"] or {}).get("content")
        likely = {t["id"]: t["logprob"] for t in content[0]["top_logprobs"]} if content else {}
        return answer["usage"]["prompt_tokens"], likely

    assert next_token(TEXT) == next_token(ids)
    assert next_token(TEXT)[0] == len(ids)
    compared = 0
    for end in range(1, len(ids) + 1):
        if likely := next_token(ids[:end])[1]:
            assert max(likely, key=likely.get) == wanted[end - 1].argmax()
            assert all(abs(value - wanted[end - 1, i]) < 1e-4 for i, value in likely.items() if value > -12)
            compared += 1
    assert compared > 5
