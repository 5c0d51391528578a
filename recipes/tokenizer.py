"""The tokenizer: learnt from a corpus or taken from a directory, and the corpus encoded with it.

Reads   --corpus (text, JSONL or Parquet; files, a folder, or a glob), --validation (the same) or a share of the corpus
Writes  output_dir/tokenizer (a Hugging Face tokenizer directory), output_dir/shards/{train,validation}

    python recipes/tokenizer.py --corpus my/texts --vocab_size 32768 --output_dir runs/mine/tokenizer
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.data.parts import check_part
from lmkit.errors import BadInput
from lmkit.processes import require_one
from lmkit.stage import Stage, run
from lmkit.tokenization.vocabulary import check_special_tokens, check_vocab_size

CORPUS, VALIDATION = "data/tales/text.txt.gz", "data/tales/text.validation.txt.gz"
BPE = ("split", "min_frequency", "trainer")  # what learning reads of the settings, first what only byte-level BPE does
LEARNING = ("vocab_size", "kind", "nfc", "max_token_length", "special_tokens", "allow_smaller_vocab", *BPE)


class TokenizerConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/tokenizer"), "where the stage writes")
    corpus: str | list[str] = source(CORPUS, "texts to learn from and encode: files, a folder, or hub:NAME@REVISION")
    validation: str | list[str] | None = source(VALIDATION, "held-out texts; of a corpus of your own: a share")
    validation_fraction: float = setting(0.02, "the share held out when no validation is given", gt=0, lt=1)
    document_separator: str | None = setting("\n\n", "what divides a text file: blank lines, or a line; null: nothing")
    part: str | None = setting(None, "as 2/8: encode this part of the corpus, and others elsewhere; needs a tokenizer")
    tokenizer: Path | None = source(None, "take this tokenizer directory instead of training one")
    vocab_size: Annotated[int, AfterValidator(check_vocab_size)] = setting(1024, "ids in all; a multiple of 128")
    kind: Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram"] = setting("bpe", "byte-level or SentencePiece")
    split: Literal["qwen2", "gpt2", "gpt4", "llama3"] = setting("qwen2", "whose expression cuts text into words (bpe)")
    nfc: bool = setting(False, "normalise to Unicode NFC first: then only NFC text comes back exactly")
    max_token_length: int | None = setting(None, "longest token in characters (bpe: bytes)", gt=1)
    min_frequency: int = setting(2, "rarer pairs are not merged (bpe)", gt=0)
    special_tokens: Annotated[list[str], AfterValidator(check_special_tokens)] = setting([], "up to 16, as <|name|>")
    allow_smaller_vocab: bool = setting(False, "accept the vocabulary that the corpus supports")
    trainer: Literal["auto", "tokenizers", "rustbpe"] = knob("auto", "who counts and merges (bpe): the same result")
    num_processes: int = knob(os.cpu_count() or 1, "processes that encode the corpus", gt=0)
    streaming: bool = knob(False, "read a hub: name over the network in each pass, without a copy on the disk")

    @model_validator(mode="before")
    @classmethod
    def _own_corpus_is_not_judged_by_tales(cls, values: dict) -> dict:
        own = values.get("corpus", CORPUS) != CORPUS and values.get("validation", VALIDATION) == VALIDATION
        return values | {"validation": None} if own else values

    @model_validator(mode="after")
    def _no_setting_is_idle(self) -> "TokenizerConfig":
        idle = dict.fromkeys(BPE, f"kind {self.kind} has no such step") if self.kind != "bpe" else {}
        idle |= dict.fromkeys(LEARNING, "a tokenizer is given and none is learnt") if self.tokenizer else {}
        idle |= {} if self.validation is None else {"validation_fraction": "validation names the held-out texts"}
        if given := [name for name in idle if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError("\n".join(f"{name}: not read, because {idle[name]}. Leave it out" for name in given))
        return self


def main(config: TokenizerConfig) -> Path:
    require_one("tokenizer.py, whose --num_processes encode the corpus,")
    check_part(config.part, config.tokenizer)
    stage = Stage("tokenizer", config)
    if stage.finished:
        return stage.directory
    from lmkit.data.shards import in_validation, write_shards
    from lmkit.data.sources import read_text
    from lmkit.tokenization import chat, measure, read, train
    from lmkit.tracking import Tracker

    def documents(split: str) -> Iterator[str]:
        """One pass over a split; documents held out of the corpus are chosen by their text."""
        options = {name: getattr(config, name) for name in ("document_separator", "streaming", "part")}
        if config.validation is not None and split == "validation":
            return read_text(config.validation, **options | {"part": None})
        corpus, fraction = read_text(config.corpus, **options), config.validation_fraction * (config.validation is None)
        return (d for d in corpus if in_validation(d, fraction) == (split == "validation"))

    def watched(split: str) -> Iterator[str]:
        for document in documents(split):
            yield document
            if (step := next(steps)) % (total // 100 + 1) == 0 and step <= total:
                tracker.log(step, {})

    # Reads everything once before anything is made: a file that cannot be read is found here.
    num_documents = {split: sum(1 for _ in documents(split)) for split in ("train", "validation")}
    if not num_documents["validation"]:
        raise BadInput("No document is held out. Give --validation, or raise --validation_fraction.")
    total, steps = sum(num_documents.values()) + num_documents["train"] * (not config.tokenizer), itertools.count(1)
    with stage, Tracker(stage.directory, total_steps=total, report_to=config.report_to) as tracker:
        tokenizer = config.tokenizer and read.load_tokenizer(config.tokenizer)
        if tokenizer is None:
            tokenizer = train.train_tokenizer(lambda: watched("train"), **config.model_dump(include={*LEARNING}))
        facts = measure.measure(tokenizer, {"validation": itertools.islice(documents("validation"), 500)})
        with stage.seal("tokenizer") as folder:
            tokenizer.save_pretrained(folder)
        with stage.seal("shards") as folder:
            for split in num_documents:
                meta = write_shards(watched(split), tokenizer, folder / split, config.num_processes, config.part).meta
                facts |= {f"{split}/{key}": value for key, value in meta.items()}
                counts = (f"{meta[f'num_{unit}']:,} {unit}" for unit in ("tokens", "documents", "bytes"))
                stage.say(f"{split}: {', '.join(counts)}")
        size = f"{len(tokenizer)} tokens, {facts['bytes_per_token']['validation']:.2f} bytes per token"
        exact = f"{facts['num_exact']} of {facts['num_documents']} held-out documents come back exactly"
        stage.say(f"tokenizer: {size}, {exact}")
        if facts["hostile_changed"]:
            stage.say(f"warning: this tokenizer changes texts with {', '.join(facts['hostile_changed'])}")
        sample = chat.encode_text(tokenizer, next(documents("validation"))[:120])
        stage.say("sample: " + "|".join(tokenizer.decode([i]) for i in sample).replace("\n", "\\n"))
        stage.finish(facts)
    return stage.directory


if __name__ == "__main__":
    run(main, TokenizerConfig, __doc__)
