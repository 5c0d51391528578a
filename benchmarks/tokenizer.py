"""The tokenizer against its peers: training, encoding, shards, memory, and a long run; one JSON line per measurement.

    python benchmarks/tokenizer.py --corpus corpus.txt                  # 95 MB, vocabulary 32768: about 15 minutes
    python benchmarks/tokenizer.py --corpus corpus.txt --megabytes 5 --vocab 8192 --rounds 1
    python benchmarks/tokenizer.py --corpus corpus.txt --parts train --trainers rustbpe lmkit --save DIR
    python benchmarks/tokenizer.py --corpus corpus.txt --parts encode shards --save DIR   # with the tokenizer of before

Every measurement is a process of its own; the sides take turns (A B C A B C ...). `value` is CPU seconds of one
thread or MB of text per CPU second, which a busy machine disturbs least; wall seconds stand beside it. Peers are
`tokenizers`, `rustbpe`, `sentencepiece` and `tiktoken`, called as their manuals do, with one split expression and size.
"""

import argparse
import hashlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
HELD_OUT = 0.05  # of the text: bytes per token and encoding speed
TRAINERS = ["tokenizers", "rustbpe", "sentencepiece", "lmkit", "lmkit_without_rustbpe"]
ENCODERS = ["hf_fast", "tokenizers", "tiktoken", "lmkit"]
PARTS = ["train", "encode", "shards", "memory", "run"]
SMALL = 10  # MB of text against which memory is compared


def emit(name, value, unit, **config):
    print(json.dumps({"name": name, "value": value, "unit": unit, "config": config}), flush=True)


def documents(path, start, stop, size=100_000):
    """Pieces of about 100 kB that end at a blank line, between two places of the file; read as they are needed."""
    with open(path, "rb") as file:
        file.seek(start)
        while start < stop:
            lines = [file.read(min(size, stop - start))]
            start += len(lines[0])
            while start < stop and lines[-1] != b"\n" and (line := file.readline()):
                lines.append(line)
                start += len(line)
            yield b"".join(lines).decode("utf-8", errors="ignore")


def parts(args):
    total = min(int(args.megabytes * 1e6), os.path.getsize(args.corpus))
    return (0, int(total * (1 - HELD_OUT))), (int(total * (1 - HELD_OUT)), total)


class Meter:
    """CPU seconds of this process and its children, and wall seconds, since it was made."""

    def __init__(self):
        self.cpu, self.wall = self._cpu(), time.perf_counter()

    @staticmethod
    def _cpu():
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def stop(self):
        return self._cpu() - self.cpu, time.perf_counter() - self.wall


def rss_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --------------------------------------------------------------------------------------- measured in its own process


def train_peer(impl, texts, vocab):
    """Training as the library's manual has it, with the split expression of Qwen2."""
    from lmkit.tokenization.byte_level import BYTE_CHARACTERS, SPLITS

    if impl == "tokenizers":
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLITS["qwen2"]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        # Bytes first, in the order of their values: the only order in which rustbpe breaks ties alike.
        trainer = trainers.BpeTrainer(vocab_size=vocab - 20, special_tokens=BYTE_CHARACTERS, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return lambda: [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    if impl == "rustbpe":
        import rustbpe

        learner = rustbpe.Tokenizer()
        learner.train_from_iterator(texts, vocab - 20, pattern=SPLITS["qwen2"])
        return lambda: [bytes(token) for token, _ in learner.get_mergeable_ranks()[256:]]
    import sentencepiece

    lines = (line for text in texts for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=io.BytesIO(), model_type="bpe", vocab_size=vocab, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, split_digits=True,
        allow_whitespace_only_pieces=True, user_defined_symbols=["\n"], max_sentence_length=100_000, num_threads=1,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return lambda: []


def measure_train(args):
    from lmkit.tokenization.byte_level import token_bytes
    from lmkit.tokenization.chat import encode_text
    from lmkit.tokenization.train import train_tokenizer

    train, held = parts(args)
    base, meter, extra = rss_megabytes(), Meter(), {}

    def read():
        return (text for _ in range(args.repeat) for text in documents(args.corpus, *train))

    if args.impl.startswith("lmkit"):
        trainer = "tokenizers" if args.impl == "lmkit_without_rustbpe" else "auto"
        tokenizer = train_tokenizer(read, vocab_size=args.vocab, trainer=trainer)
        cpu, wall = meter.stop()
        peak = rss_megabytes() - base
        merges = [tuple(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
        texts = list(documents(args.corpus, *held))
        extra["bytes_per_token"] = sum(len(t.encode()) for t in texts) / sum(
            len(encode_text(tokenizer, t)) for t in texts
        )
        if args.save:
            tokenizer.save_pretrained(args.save)
    else:
        result = train_peer(args.impl, read(), args.vocab)
        cpu, wall = meter.stop()
        peak = rss_megabytes() - base
        merges = result()
    if merges:
        joined = [m if isinstance(m, bytes) else token_bytes("".join(m)) for m in merges]
        extra["merges_sha256"] = hashlib.sha256(b"\0".join(joined)).hexdigest()
        extra["num_merges"] = len(merges)
    emit("bpe_train", cpu, "CPU s", impl=args.impl, wall_seconds=wall, peak_megabytes=peak, **extra)


def measure_encode(args):
    import numpy as np
    from transformers import AutoTokenizer

    from lmkit.tokenization import byte_level

    tokenizer = AutoTokenizer.from_pretrained(args.save)
    spec = tokenizer.backend_tokenizer.to_str()
    texts = [t for piece in documents(args.corpus, *parts(args)[1]) for t in _short(piece)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    if args.impl == "hf_fast":
        run = lambda: tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
    elif args.impl == "tokenizers":
        run = lambda: [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]  # noqa: E731
    elif args.impl == "tiktoken":
        twin = byte_level._tiktoken_twin(json.loads(spec))
        run = lambda: twin.encode_ordinary_batch(texts, num_threads=1)  # noqa: E731
    else:
        encode = byte_level.make_encoder(spec, fast=True)
        run = lambda: encode(texts)  # noqa: E731
    ids = run()
    meter = Meter()
    run()
    cpu, wall = meter.stop()
    digest = hashlib.sha256(np.concatenate([np.asarray(i, np.uint32) for i in ids]).tobytes()).hexdigest()
    emit("encode", size / cpu, "MB/CPU s", impl=args.impl, wall_seconds=wall, ids=digest, documents=len(texts))


def _short(piece, size=4000):
    """Documents of about 4 kB, as web pages are."""
    start = 0
    while start < len(piece):
        end = piece.find("\n\n", start + size)
        end = len(piece) if end < 0 else end + 2
        yield piece[start:end]
        start = end


def measure_shards(args):
    from transformers import AutoTokenizer

    from lmkit.data.shards import write_shards

    tokenizer = AutoTokenizer.from_pretrained(args.save)
    if args.impl == "files":
        from lmkit.data.sources import read_text

        texts = read_text(args.corpus)
    else:
        pieces = (piece for _ in range(args.repeat) for piece in documents(args.corpus, *parts(args)[0]))
        texts = (t for piece in pieces for t in _short(piece))
    with tempfile.TemporaryDirectory() as folder:
        meter = Meter()
        written = write_shards(texts, tokenizer, Path(folder), num_processes=args.processes)
        cpu, wall = meter.stop()
        size = written.num_bytes / 1e6
    emit(
        "shards", size / wall, "MB/s", documents=args.impl, processes=args.processes, cpu_seconds=cpu,
        wall_seconds=wall, megabytes=size, megabytes_per_cpu_second=size / cpu, peak_megabytes=rss_megabytes(),
    )  # fmt: skip


def measure_run(args):
    from transformers import AutoTokenizer

    from lmkit.tokenization.chat import encode_text

    tokenizer = AutoTokenizer.from_pretrained(args.save)
    normal = next(documents(args.corpus, 0, 400_000, 400_000)).encode()[:200_000].decode("utf-8", errors="ignore")
    usual = None
    for name, text in [("normal text", normal)] + [(repr(c), c * 200_000) for c in "a= \n"]:
        seconds = []
        for _ in range(5):
            meter = Meter()
            encode_text(tokenizer, text)
            seconds.append(meter.stop()[0])
        usual = usual or min(seconds)
        emit("long_run", min(seconds) / usual, "x", of=name, characters=len(text), cpu_seconds=min(seconds))


# --------------------------------------------------------------------------------------------------------- all of it


def child(args, what, impl="", **changes):
    """One measurement in a new process of one thread; its JSON lines, printed and returned."""
    flags = {"corpus": args.corpus, "megabytes": args.megabytes, "vocab": args.vocab, "save": args.save}
    words = [f"--{key}={value}" for key, value in (flags | changes).items()]
    threads = {
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, f"--measure={what}", f"--impl={impl}", *words]
    result = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    print(result.stdout, end="", flush=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def interleaved(args, what, impls, **changes):
    """impl -> its rows, over the rounds, each side once a round."""
    rows = {impl: [] for impl in impls}
    for _ in range(args.rounds):
        for impl in impls:
            rows[impl] += child(args, what, impl, **changes)
    return rows


def median(rows):
    return statistics.median(row["value"] for row in rows)


def compare_training(args):
    trained = interleaved(args, "train", args.trainers)
    seconds = {impl: median(rows) for impl, rows in trained.items()}
    merges = {impl: rows[0]["config"].get("merges_sha256") for impl, rows in trained.items() if impl != "sentencepiece"}
    for impl, found in list(merges.items())[1:]:
        emit("merges_equal", found == merges[args.trainers[0]], "bool", of=[args.trainers[0], impl])
    peers = [impl for impl in args.trainers if not impl.startswith("lmkit")]
    best = min(peers, key=seconds.get)
    if "lmkit" in seconds:
        emit("bpe_train_vs_best_peer", seconds["lmkit"] / seconds[best], "x", peer=best, seconds=seconds)
    if {"lmkit_without_rustbpe", "tokenizers"} <= set(seconds):
        ratio = seconds["lmkit_without_rustbpe"] / seconds["tokenizers"]
        emit("bpe_train_without_rustbpe_vs_tokenizers", ratio, "x", seconds=seconds)


def compare_encoding(args):
    encoded = interleaved(args, "encode", ENCODERS)
    same = len({row["config"]["ids"] for rows in encoded.values() for row in rows}) == 1
    speed = {impl: median(rows) for impl, rows in encoded.items()}
    emit("encode_vs_hf_fast", speed["lmkit"] / speed["hf_fast"], "x", same_ids=same, megabytes_per_cpu_second=speed)


def compare_shards(args):
    """Per core against `PreTrainedTokenizerFast` measured beside it, and processes against one."""
    rows = {n: [] for n in args.scaling}
    peer = []
    for _ in range(args.rounds):
        peer += child(args, "encode", "hf_fast")
        for n in args.scaling:
            rows[n] += child(args, "shards", "memory", processes=n)
    alone = rows[args.scaling[0]]
    per_core = statistics.median(row["config"]["megabytes_per_cpu_second"] for row in alone)
    emit("shards_vs_hf_fast_per_core", per_core / median(peer), "x", megabytes_per_cpu_second=per_core)
    for n in args.scaling[1:]:
        emit("shards_scaling", median(rows[n]) / median(alone), "x", processes=n)
    child(args, "shards", "files")


def compare_memory(args):
    """A text, and the same ten times over. (Ten times as much new text has more words, and a longer longest line.)"""
    made = Path(args.save, "tokenizer.json").is_file()
    for what, impl in [("train", "lmkit"), ("train", "lmkit_without_rustbpe"), *[("shards", "memory")] * made]:
        rows = [
            child(args, what, impl, save=args.save if what == "shards" else "", megabytes=SMALL, repeat=n)[0]
            for n in (1, 10)
        ]
        peaks = [row["config"]["peak_megabytes"] for row in rows]
        emit(f"{what}_memory_growth", peaks[1] - peaks[0], "MB", impl=impl, megabytes=[SMALL, 10 * SMALL], peaks=peaks)


def main(args):
    if "train" in args.parts:
        compare_training(args)
    if "encode" in args.parts:
        compare_encoding(args)
    if "shards" in args.parts:
        compare_shards(args)
    if "memory" in args.parts:
        compare_memory(args)
    if "run" in args.parts:
        child(args, "run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a UTF-8 text file")
    parser.add_argument("--megabytes", type=float, default=95, help="how much of it; a twentieth is held out")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--scaling", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--save", default="", help="folder of lmkit's tokenizer: train writes it, other parts read it")
    parser.add_argument("--measure", choices=["train", "encode", "shards", "run"], help=argparse.SUPPRESS)
    for hidden, default in (("impl", ""), ("processes", 1), ("repeat", 1)):
        parser.add_argument(f"--{hidden}", type=type(default), default=default, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        globals()[f"measure_{arguments.measure}"](arguments)
    else:
        with tempfile.TemporaryDirectory() as directory:
            arguments.save = arguments.save or directory
            main(arguments)
