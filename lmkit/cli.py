"""The `lmkit` command: what is not a training stage. Those are `python recipes/STAGE.py`.

Imports stay light, so that `lmkit --help` and `lmkit status` answer at once; a command imports what it needs.
"""

import contextlib
import functools
import getpass
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from lmkit.artifact import MANIFEST, verify
from lmkit.errors import BadInput, CorruptInput, Interrupted, Locked, Stopped
from lmkit.rounds import CHAIN, in_round, rounds_of, stages_of
from lmkit.stage import read_record
from lmkit.status import human_size, next_stage, stage_state

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
TALKERS = ("ppo", "sft", "pretrain")  # stages whose model writes text, the latest first
tokenizer = typer.Typer(no_args_is_help=True, help="Look into a tokenizer.")
app.add_typer(tokenizer, name="tokenizer")
vision = typer.Typer(no_args_is_help=True, help="Look into images and image models.")
app.add_typer(vision, name="vision")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, such as runs/tiny")]


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turns the errors a user can cause into one message and their exit code."""
    try:
        yield
    except (BadInput, Locked, Stopped, CorruptInput, Interrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


@app.command()
def status(run: Run) -> None:
    """The stages of a run: state, age, size, fingerprint, and what would run next and why."""
    with exit_codes():
        rows = [(stage, *stage_state(run, stage)) for stage in stages_in(run)]
    header = ("stage", "age", "size", "fingerprint", "state")
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"\nnext: {next_stage(run, {stage: state for stage, *_, state in rows})}")


@app.command("verify")
def verify_run(run: Run) -> None:
    """Hash every sealed artifact and checkpoint again; exit code 5 when one is damaged."""
    with exit_codes():
        folders = {path.parent for path in run.rglob(MANIFEST)}
        recorded = {}
        for stage in stages_in(run):
            artifacts = (read_record(run / stage) or {"artifacts": {}})["artifacts"]
            recorded |= {run / stage / name: manifest_id for name, manifest_id in artifacts.items()}
        damaged = 0
        for folder in sorted(folders | set(recorded)):
            try:
                found = verify(folder)
                if found != recorded.get(folder, found):
                    raise CorruptInput(f"{folder} is whole, but not what {folder.parent}/stage.json records.")
                print(f"ok       {folder}  {human_size(folder)}  {found[:12]}")
            except CorruptInput as error:
                damaged += 1
                print(f"damaged  {folder}  {error}")
        if damaged:
            raise CorruptInput(
                f"{damaged} of {len(folders | set(recorded))} are damaged. Redo their stage with "
                "`python recipes/rlhf.py --config FILE --redo STAGE`, FILE the chain file of this run; a damaged "
                "checkpoint may be deleted."
            )


@app.command()
def report(run: Run) -> None:
    """Write report.html, report.md and plots/ from what the run's stages recorded."""
    with exit_codes():
        stages_in(run)
        from lmkit.report.report import write_report

        print(write_report(run))


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory (its latest model) or a model directory")],
    compare: Annotated[str, typer.Option(help="models to put side by side, such as sft,ppo")] = "",
    seed: Annotated[int, typer.Option(min=0, help="seed of the first answer")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer in tokens")] = 256,
) -> None:
    """Talk to a model, or to several with the same seed. From a pipe: one question a line, one answer a line."""
    with exit_codes():
        names = [name.strip() for name in compare.split(",") if name.strip()]
        found = find_models(run, names)
        from lmkit.generation.chat import Chat, load_voice, talk

        voices = [load_voice(name, path) for name, path in found.items()]
        talk(Chat(voices, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a model directory, or a run (its latest model)")],
    gguf: Annotated[Path, typer.Option(help="the file to write, for llama.cpp and what is built on it")],
    dtype: Annotated[Literal["f32", "f16", "bf16", "q8_0"], typer.Option(help="of its matrices; f32 is exact")] = "f32",
) -> None:
    """Write a model and its tokenizer as one GGUF file."""
    with exit_codes():
        (found,) = find_models(model, []).values()
        if importlib.util.find_spec("gguf") is None:
            raise BadInput("GGUF files are written by the package gguf, which is not installed: pip install -e .[gguf]")
        from lmkit.models.gguf_file import write_gguf

        for note in write_gguf(found, gguf, dtype):
            print(f"note: {note}")
        print(f"{gguf} written: {found} with {dtype} matrices, {human_size(gguf)}")


@app.command()
def label(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="pairs to compare: prompt and completions (two) a row")],
    annotator: Annotated[str, typer.Option(help="whose answers these are; by default the login name")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of 127.0.0.1; 0 takes a free one")] = 0,
    report: Annotated[bool, typer.Option("--report", help="print what was answered and how far people agree")] = False,
    export: Annotated[Path | None, typer.Option(help="write prompt, chosen, rejected of the decided pairs")] = None,
) -> None:
    """Compare pairs of completions on a local page, by keyboard; every answer is saved at once beside FILE."""
    with exit_codes():
        from lmkit.label import agreement, server, store

        if report or export:
            pairs, answers = store.read_pairs(file), store.all_answers(file)
            if report:
                print(agreement.report(pairs, answers))
            if export:
                print(f"{store.export(export, pairs, answers)} decided pairs written to {export}")
            return
        server.serve(file, annotator or getpass.getuser(), port)


@app.command()
def curate(
    prompts: Annotated[str, typer.Argument(metavar="PROMPTS", help="a file, folder or hub name of prompts")],
    run: Run,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="how many to keep; all that repeat none")] = None,
    num_clusters: Annotated[int, typer.Option(min=1, help="clusters to divide them into")] = 16,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="similarity from which two are duplicates")] = 0.8,
    seed: Annotated[int, typer.Option(help="seed of clusters and choice")] = 0,
) -> None:
    """Leave out duplicate prompts, cluster the rest by the run's SFT model, keep as many of each: RUN/curation."""
    with exit_codes():
        stages_in(run)
        from lmkit.data.curation import curate

        options = {"num_prompts": num_prompts, "num_clusters": num_clusters, "threshold": threshold, "seed": seed}
        found = curate(prompts, run, **options)
    for row in found["clusters"]:
        print("cluster {cluster}: {chosen} of {size}, such as: {typical}".format(**row))
    print(
        f"{found['num_prompts']} prompts, {found['num_exact_duplicates']} exact and {found['num_near_duplicates']} "
        f"near duplicates, {found['num_chosen']} kept in {run / 'curation' / 'prompts.jsonl'}"
    )


@tokenizer.command()
def explain(
    text: Annotated[str, typer.Argument(metavar="WORD", help="a word or a short text")],
    tokenizer: Annotated[Path, typer.Option(help="the tokenizer's directory")] = Path("runs/tiny/tokenizer/tokenizer"),
) -> None:
    """Tell step by step how a word becomes ids: how it is cut, and each merge."""
    with exit_codes():
        from lmkit.tokenization.explain import explain

        print(explain(tokenizer, text))


@tokenizer.command()
def measure(
    tokenizer: Annotated[str, typer.Argument(metavar="DIR", help="the tokenizer's directory")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="texts it has not learnt from")],
    compare: Annotated[
        list[str] | None, typer.Option(help="one more tokenizer: a directory, or a name in the cache of the Hub")
    ] = None,
) -> None:
    """Bytes per token by file, vocabulary used, longest tokens, and which texts do not come back exactly."""
    with exit_codes():
        from lmkit.data.sources import read_text
        from lmkit.tokenization.measure import table
        from lmkit.tokenization.read import find_tokenizer

        tokenizers = {name: find_tokenizer(name) for name in [tokenizer, *(compare or [])]}
        print(table(tokenizers, {str(file): functools.partial(read_text, file) for file in files}))


@app.command()
def embeddings(
    vectors: Annotated[Path, typer.Argument(metavar="DIR", help="word vectors, such as runs/tiny/embeddings/vectors")],
    words: Annotated[list[str], typer.Argument(metavar="WORD...", help="words that are one token each")],
    analogy: Annotated[
        list[str] | None, typer.Option(help="A,B,C: what is to C as B is to A, such as man,king,woman")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="neighbours to show")] = 5,
) -> None:
    """What word vectors take for alike: nearest tokens, cosines beside those of one-hot codes, analogies."""
    with exit_codes():
        asked = [[word.strip() for word in text.split(",")] for text in analogy or []]
        if wrong := next((text for text, parts in zip(analogy or [], asked) if len(parts) != 3), None):
            raise BadInput(f"--analogy {wrong} is not three words. Write it as --analogy man,king,woman.")
        from lmkit.models.embeddings import describe

        print(describe(vectors, words, asked, num))


# --------------------------------------------------------------------------------------------------- what is in a run


def stages_in(run: Path) -> list[str]:
    """The chain's stages, when `run` holds at least one of them; BadInput says what is there otherwise."""
    if any((run / stage).is_dir() for stage in CHAIN):
        return stages_of(rounds_of(run))
    raise BadInput(f"{run} is not a run: wanted a folder with {', '.join(CHAIN)}, such as runs/tiny. {neighbours(run)}")


def find_models(run: Path, compare: list[str]) -> dict[str, Path]:
    """Name -> model folder: those `compare` names, else the latest of a run, or `run` itself when it is a model."""
    for folder in (run, run / "model"):
        if (folder / "config.json").is_file():
            if compare:
                raise BadInput(f"{folder} is one model; --compare {','.join(compare)} needs a run, such as runs/tiny.")
            return {folder.parent.name if folder.name == "model" else folder.name: folder}
    talkers = [*(in_round("ppo", number) for number in range(rounds_of(run), 1, -1)), *TALKERS]
    there = {name: run / name / "model" for name in talkers if (run / name / "model" / "config.json").is_file()}
    for folder in (run, run / "vectors"):
        if not there and (folder / "vectors.safetensors").is_file():
            raise BadInput(
                f"{folder} holds word vectors, which predict no next token: nothing can be generated from them. Ask "
                f"them with `lmkit embeddings {folder} WORD...`, or pretrain a model that starts from them: "
                f"`python recipes/pretrain.py --model.arch neural_ngram --embeddings {folder}`."
            )
    if not there:
        raise BadInput(
            f"{run} has no model that talks: wanted a model folder, or a run (such as runs/tiny) with "
            f"{' or '.join(f'{name}/model' for name in TALKERS)}. {neighbours(run)}"
        )
    if missing := [name for name in compare if name not in there]:
        raise BadInput(f"{run} has no model {', '.join(missing)}. It has {', '.join(there)}.")
    return {name: there[name] for name in compare or list(there)[:1]}


def neighbours(run: Path) -> str:
    """What is in `run`, or beside it when it does not exist, as a sentence."""
    folder = run if run.is_dir() else run.parent
    names = sorted(path.name for path in folder.glob("*/") if not path.name.startswith("."))
    return f"{folder} has {', '.join(names[:20])}." if names else f"{folder} has no folders."


@vision.command("inspect")
def inspect_images(
    data: Annotated[str, typer.Argument(metavar="DATA", help="folder, .npz, .parquet or builtin:digits")],
    label_pattern: Annotated[str | None, typer.Option(help="regular expression of the label in a file's name")] = None,
) -> None:
    """Classes, counts, sizes, damaged files and duplicates of a source of images."""
    with exit_codes():
        from lmkit.vision.inspect import inspect

        print("\n".join(inspect(data, label_pattern)))


Templates = Annotated[
    list[str] | None,
    typer.Option("--template", help="two towers: text with {} for a class's name; may be repeated"),
]


@vision.command("evaluate")
def evaluate_image_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="the directory of a classifier, or of two towers")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="images with labels or captions")],
    out: Annotated[Path, typer.Option(help="folder for metrics.json, report.txt, confusion.png, mistakes.png")],
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave damaged images out")] = False,
    template: Templates = None,
) -> None:
    """Judge a model on images it may never have seen: a classifier, or towers by retrieval and zero-shot classes."""
    with exit_codes():
        from lmkit.vision.clip import is_clip

        if is_clip(model):
            from lmkit.vision import match

            print(match.evaluate_directory(model, data, split, out, template or ["{}"], skip_bad)[1])
            return
        from lmkit.vision.evaluate import evaluate_directory

        print(evaluate_directory(model, data, split, out, skip_bad)[1])


@vision.command("predict")
def predict_images(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="the directory of a classifier, or of two towers")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="image files")],
    top: Annotated[int, typer.Option(min=1, help="classes to show for each image")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
    classes: Annotated[str, typer.Option(help="image and text towers: names to choose from, commas between")] = "",
    template: Templates = None,
) -> None:
    """What a classifier takes each image for; of two towers, which of the classes you name."""
    with exit_codes():
        from lmkit.vision.clip import is_clip

        names = [name.strip() for name in classes.split(",") if name.strip()]
        if is_clip(model) != bool(names):
            raise BadInput(
                f"{model} knows its own classes: leave --classes out."
                if names
                else f"{model} has no classes of its own: name them, as in --classes 'a cat,a dog'."
            )
        if names:
            from lmkit.vision.match import name_images

            found = name_images(model, images, names, template or ["{}"], top)
        else:
            from lmkit.vision.evaluate import predict

            found = predict(model, images, top)
        for path, best in zip(images, found):
            if as_json:
                print(json.dumps({"image": str(path), "classes": [{"name": n, "probability": p} for n, p in best]}))
            else:
                print(f"{path}  " + "  ".join(f"{name} {probability:.1%}" for name, probability in best))


@vision.command("rank")
def rank_images(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="the directory of image and text towers")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="images, such as samples of a diffusion model")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="what they should show")],
    top: Annotated[int | None, typer.Option(min=1, help="how many to print; all")] = None,
) -> None:
    """Order a folder's images by CLIP score: how well each shows what the text says, the best first."""
    with exit_codes():
        from lmkit.vision.data import images_below
        from lmkit.vision.match import rank_images

        if not folder.is_dir() or not (images := images_below(folder)):
            raise BadInput(f"{folder} is no folder with images. Give one that holds PNG or JPEG files.")
        for path, score in rank_images(model, images, text)[:top]:
            print(f"{score:.4f}  {path}")


@vision.command("sample")
def sample_images(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="the directory of a diffusion model")],
    out: Annotated[Path, typer.Option(help="folder for the images, a PNG each")],
    caption: Annotated[list[str] | None, typer.Option(help="caption or class to draw; may be given again")] = None,
    num: Annotated[int, typer.Option(min=1, help="images of each caption")] = 8,
    sampler: Annotated[Literal["ddpm", "ddim", "euler", "heun"] | None, typer.Option(help="as in training")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="steps from noise to image; as in training")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="guidance scale; as in training")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the noise")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="PNG of all images, a row a caption")] = None,
    gif: Annotated[Path | None, typer.Option(help="GIF of the same on the way out of noise")] = None,
) -> None:
    """Draw images with a diffusion model."""
    with exit_codes():
        from lmkit.vision.drawn import sample_directory

        given = {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": guidance}
        changes = {name: value for name, value in given.items() if value is not None}
        files = sample_directory(model, caption or [], num, changes, seed, out, sheet, gif)
        print(f"{len(files)} images written to {out}")
