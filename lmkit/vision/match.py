"""What a pair of towers can do: name images it was never taught classes of, find images by words, rank them by a text.

Shapes: N images, M texts, K classes, D width of the common space; embeddings have length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, VisionTextDualEncoderModel

from lmkit.artifact import write_json
from lmkit.errors import BadInput
from lmkit.vision.classifier import channels_last
from lmkit.vision.clip import caption_ids, load_clip
from lmkit.vision.data import Example, read_images, stratified
from lmkit.vision.options import Preprocess
from lmkit.vision.pixels import load_pixels, normalize

RECALLS = (1, 5, 10)


@torch.no_grad()
def embed_images(
    model: VisionTextDualEncoderModel, pixels: Tensor, preprocess: Preprocess, batch_size: int = 256
) -> Tensor:
    """float32 [N, D] on the CPU for uint8 [N, C, S, S]; the model's mode is left as it was."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    images = (channels_last(normalize(part.to(device), preprocess)) for part in pixels.split(batch_size))
    found = [model.get_image_features(pixel_values=part).pooler_output.float().cpu() for part in images]
    model.train(was)
    return F.normalize(torch.cat(found), dim=1)


@torch.no_grad()
def embed_texts(
    model: VisionTextDualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 256,
) -> Tensor:
    """float32 [M, D] on the CPU; texts are cut as in training."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    ids, mask, _ = caption_ids(tokenizer, texts)
    parts = zip(ids.to(device).split(batch_size), mask.to(device).split(batch_size))
    found = [model.get_text_features(input_ids=i, attention_mask=m).pooler_output.float().cpu() for i, m in parts]
    model.train(was)
    return F.normalize(torch.cat(found), dim=1)


def class_embeddings(
    model: VisionTextDualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """[K, D]: a class is the mean of what each template says of it, as in section 3.1.4 of Radford et al. 2021.

    templates: texts with {} for the name. BadInput for one that has none.
    """
    if wrong := [template for template in templates if "{}" not in template] or not templates:
        raise BadInput(f"templates: {wrong[0] if templates else 'none'!r} has no place {{}} for the name of a class.")
    texts = [template.replace("{}", name) for name in names for template in templates]
    found = embed_texts(model, tokenizer, texts).unflatten(0, (len(names), len(templates)))
    return F.normalize(found.mean(1), dim=1)


def recall_at(similarity: Tensor, relevant: Tensor, k: int) -> float:
    """Share of the rows with something relevant among their k most similar columns; a tie counts against.

    similarity: [N, M]; relevant: bool [N, M], True at least once a row.

    >>> recall_at(torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]), torch.tensor([[1, 0, 0], [0, 1, 0]]).bool(), 1)
    0.5
    """
    best = similarity.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    before = (~relevant & (similarity >= best)).sum(1)
    return (before < k).double().mean().item()


def retrieval(images: Tensor, texts: Tensor, text_of: Tensor) -> dict[str, float]:
    """recall@1, 5 and 10 of finding an image's text among M distinct ones, and a text's images among N.

    images: [N, D]; texts: [M, D]; text_of: int64 [N], the row of `texts` that is each image's caption.
    """
    similarity, relevant = images @ texts.T, F.one_hot(text_of, len(texts)).bool()
    found = {f"image_to_text/recall_at_{k}": recall_at(similarity, relevant, k) for k in RECALLS}
    return found | {f"text_to_image/recall_at_{k}": recall_at(similarity.T, relevant.T, k) for k in RECALLS}


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """2.5 max(cosine, 0) of embeddings [..., D] and [..., D] (Hessel et al. 2021, CLIPScore, arXiv:2104.08718).

    >>> clip_score(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.8, 0.6])).tolist()
    [2.0, 0.0]
    """
    return 2.5 * F.cosine_similarity(images, texts, dim=-1).clamp(min=0)


def match_scores(
    model: VisionTextDualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    preprocess: Preprocess,
    pixels: Tensor,
    examples: Sequence[Example],
    templates: Sequence[str],
    known: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """`retrieval` where all have captions, zero_shot/accuracy where all have labels, of which there are two or more.

    known: labels that training had; where others occur too, the images of both are also judged apart, `_seen` and
    `_unseen`, among all classes.
    """
    found, images = {}, embed_images(model, pixels, preprocess)
    if all(example.caption for example in examples):
        captions = sorted({example.caption for example in examples})
        text_of = torch.tensor([captions.index(example.caption) for example in examples])
        found |= retrieval(images, embed_texts(model, tokenizer, captions), text_of)
    if all(example.label for example in examples) and len(names := sorted({e.label for e in examples})) > 1:
        numbers = torch.tensor([names.index(example.label) for example in examples])
        hits = (images @ class_embeddings(model, tokenizer, names, templates).T).argmax(1) == numbers
        found["zero_shot/accuracy"] = hits.double().mean().item()
        seen = torch.tensor([example.label in known for example in examples])
        if seen.any() and not seen.all():
            found["zero_shot/accuracy_seen"] = hits[seen].double().mean().item()
            found["zero_shot/accuracy_unseen"] = hits[~seen].double().mean().item()
    return found


def captioned_splits(source: str, caption: str | None, test_fraction: float, seed: int) -> dict[str, list[Example]]:
    """train and test of a source of images with captions; a source without a test split is tested on its validation.

    caption: a text with {} for the label, for images that have a label and no caption. test_fraction: share of train
    that is the test where there is neither. Raises BadInput when an image is left without a caption.
    """
    if caption is not None and "{}" not in caption:
        raise BadInput(f"caption: {caption!r} has no place {{}} for the label.")
    splits = read_images(source)
    for split, examples in splits.items():
        if caption is not None:
            filled = [caption.replace("{}", e.label) if e.label and not e.caption else e.caption for e in examples]
            splits[split] = examples = [replace(e, caption=text) for e, text in zip(examples, filled)]
        if missing := [example.name for example in examples if not example.caption]:
            raise BadInput(
                f"{len(missing)} of {len(examples)} images of {split} have no caption, the first is {missing[0]}. Give "
                "metadata.csv with file_name and text, or --caption 'a photo of {}' for images with labels."
            )
    if "train" not in splits:
        raise BadInput(f"{source} has the splits {', '.join(splits)} and no train.")
    train, test = splits["train"], splits.get("test", splits.get("validation"))
    if test is None:
        train, test = stratified(train, test_fraction, seed)
        if not test:
            raise BadInput(f"{test_fraction:.0%} of {len(train)} images leave none to test on; raise test_fraction.")
    return {"train": train, "test": test}


# ------------------------------------------------------------------------------------------------ asking a directory


def evaluate_directory(
    path: Path, data: str, split: str, out: Path, templates: Sequence[str], skip_bad: bool = False
) -> tuple[dict[str, Any], str]:
    """`match_scores` of a directory on a split of any source, written to metrics.json; (the scores, lines of text)."""
    model, tokenizer, preprocess = load_clip(path)
    splits = read_images(data)
    if split not in splits:
        raise BadInput(f"{data} has the splits {', '.join(splits)}; wanted {split!r}. Name one with --split.")
    pixels, examples, _ = load_pixels(splits[split], preprocess, skip_bad)
    found = match_scores(model, tokenizer, preprocess, pixels, examples, templates)
    if not found:
        raise BadInput(f"{data} has neither captions nor two classes for all images of {split}; nothing to judge by.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", found | {"num_images": len(pixels)})
    return found, table(found)


def table(found: dict[str, float]) -> str:
    """The scores as lines for people."""
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {value:.4f}" for name, value in found.items())


def name_images(
    path: Path, images: Sequence[Path], classes: Sequence[str], templates: Sequence[str], top: int
) -> list[list[tuple[str, float]]]:
    """For each image file the `top` of `classes`, which the model was never taught, with probabilities."""
    model, tokenizer, preprocess = load_clip(path)
    pixels = _pixels(images, preprocess)
    texts = class_embeddings(model, tokenizer, classes, templates)
    logits = model.logit_scale.exp().item() * embed_images(model, pixels, preprocess) @ texts.T
    best = logits.softmax(1).topk(min(top, len(classes)))
    return [[(classes[i], p) for i, p in zip(ids, ps)] for ids, ps in zip(best.indices.tolist(), best.values.tolist())]


def rank_images(path: Path, images: Sequence[Path], text: str) -> list[tuple[Path, float]]:
    """(image file, CLIP score with `text`), the best first: how well each shows what the text says."""
    model, tokenizer, preprocess = load_clip(path)
    embeddings = embed_images(model, _pixels(images, preprocess), preprocess)
    scores = clip_score(embeddings, embed_texts(model, tokenizer, [text]))
    return [(images[i], scores[i].item()) for i in scores.argsort(descending=True, stable=True).tolist()]


def _pixels(images: Sequence[Path], preprocess: Preprocess) -> Tensor:
    for path in images:
        if not Path(path).is_file():
            raise BadInput(f"{path} is no file; wanted an image.")
    return load_pixels([Example(str(path), Path(path)) for path in images], preprocess)[0]
