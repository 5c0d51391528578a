"""Two towers and their loss: numbers by hand, transformers' own loss, processes, padding, directories."""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel, VisionTextDualEncoderModel, ViTConfig, ViTModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from lmkit.errors import BadInput
from lmkit.models.presets import ModelConfig
from lmkit.vision.classifier import new_classifier
from lmkit.vision.clip import (
    Contrast,
    caption_ids,
    contrastive_loss,
    image_tower,
    language_model,
    load_clip,
    pair_towers,
    save_clip,
)
from lmkit.vision.match import embed_images, embed_texts
from lmkit.vision.options import Augment, Preprocess

PREPROCESS = Preprocess(size=8, channels=1, mean=[0.3], std=[0.4])
GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=GENERATOR)
CAPTIONS = ["a cat", "a dog beside a cat", "an owl", "a dog"]


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(0)
    return language_model(None, ModelConfig(preset="nano", context_length=16), CAPTIONS * 5, 384, 16)


@pytest.fixture
def task(language):
    torch.manual_seed(1)
    towers = pair_towers(image_tower("resnet18_narrow", PREPROCESS), language[0], 32)
    return Contrast(towers, PREPROCESS, Augment()).eval()


def batch(language):
    ids, mask, _ = caption_ids(language[1], CAPTIONS)
    return {"pixels": PIXELS, "input_ids": ids, "attention_mask": mask}


# ------------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_worked_by_hand():
    """Both texts point to the first image: ln 2 for each image; ln(1 + 1/e) and 1 more for the texts."""
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    by_image, by_text = math.log(2), math.log(1 + math.exp(-1)) + 0.5
    loss = contrastive_loss(images, texts, torch.tensor(0.0)).item()
    assert loss == pytest.approx((by_image + by_text) / 2)
    assert contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor(2.0).log()).item() == pytest.approx(
        math.log(1 + math.exp(-2))
    )


def test_the_loss_is_transformers_own():
    images, texts = torch.randn(2, 6, 5, generator=GENERATOR)
    cosine = F.normalize(texts, dim=1) @ F.normalize(images, dim=1).T
    expected = image_text_contrastive_loss(cosine * math.exp(1.7))
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(1.7)), expected)


def test_the_task_counts_pairs_and_is_the_stock_models_loss(task, language):
    loss, count = task(**batch(language))
    ids, mask, _ = caption_ids(language[1], CAPTIONS)
    images = (PIXELS.float() / 255 - 0.3) / 0.4
    stock = task.model(input_ids=ids, attention_mask=mask, pixel_values=images, return_loss=True).loss
    torch.testing.assert_close(loss, 4 * stock)
    assert count == 4


def in_one_of_two(rank, folder, queue, images, texts):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = slice(3 * rank, 3 * rank + 3)
    own = [tensor[half].clone().requires_grad_() for tensor in (images, texts)]
    scale = torch.tensor(1.2, requires_grad=True)
    loss = 3 * contrastive_loss(*own, scale)
    loss.backward()
    queue.put((rank, [x.tolist() for x in (loss.detach(), own[0].grad, own[1].grad, scale.grad)]))
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    images, texts = torch.randn(2, 6, 5, generator=GENERATOR)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=in_one_of_two, args=(r, tmp_path, queue, images, texts)) for r in (0, 1)]
    for child in children:
        child.start()
    parts = [[torch.tensor(x) for x in part] for _, part in sorted(queue.get(timeout=60) for _ in children)]
    for child in children:
        child.join()
    whole = [images.requires_grad_(), texts.requires_grad_(), torch.tensor(1.2, requires_grad=True)]
    loss = 6 * contrastive_loss(*whole)
    loss.backward()
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss.detach())
    for place, tensor in ((1, images), (2, texts)):
        torch.testing.assert_close(torch.cat([part[place] for part in parts]), tensor.grad)
    torch.testing.assert_close(parts[0][3] + parts[1][3], whole[2].grad)


def test_the_temperature_is_bounded_in_training(task, language):
    task.model.logit_scale.data.fill_(7.0)
    task(**batch(language))
    assert task.model.logit_scale.item() == 7.0
    task.train()(**batch(language))
    assert task.model.logit_scale.exp().item() == pytest.approx(100)


# ---------------------------------------------------------------------------------------------------------- the towers


def test_a_caption_is_read_to_its_end_whatever_stands_beside_it(task, language):
    together = embed_texts(task.model, language[1], CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(embed_texts(task.model, language[1], [caption])[0], together[row])
    ends = embed_texts(task.model, language[1], ["a cat beside a dog", "a dog beside a dog"])
    assert not torch.allclose(*ends, atol=1e-3)  # the last token has seen the first


def test_captions_end_and_are_cut_and_name_no_special_token(language):
    tokenizer = language[1]
    ids, mask, num_cut = caption_ids(tokenizer, ["a cat", "a cat " * 20, "<|pad|> cat"])
    assert ids.shape == (3, 16)
    assert num_cut == 1
    assert [row[m][-1].item() for row, m in zip(ids, mask)] == [tokenizer.eos_token_id] * 3
    assert tokenizer.decode(ids[0][mask[0]][:-1]) == "a cat"
    assert tokenizer.pad_token_id not in ids[2][mask[2]]


def test_new_towers_keep_the_weights_they_were_given(tmp_path, language):
    classifier = new_classifier("cifar", Preprocess(size=32, channels=3), ["x", "y"])
    classifier.save_pretrained(tmp_path / "image")
    for part in language:
        part.save_pretrained(tmp_path / "text")
    tower = image_tower(f"hf:{tmp_path / 'image'}", Preprocess(size=32, channels=3))
    text, _ = language_model(tmp_path / "text", ModelConfig(), [], 0, 16)
    model = pair_towers(tower, text, 8)
    given = {f"vision_model.body.{n}": t for n, t in classifier.body.state_dict().items()}
    given |= {f"text_model.language_model.{n}": t for n, t in language[0].base_model.state_dict().items()}
    found = model.state_dict()
    assert set(found) == {*given, "visual_projection.weight", "text_projection.weight", "logit_scale"}
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    assert model.config.vision_config.hidden_size == 64


def test_a_classifiers_body_sees_what_it_learnt_from(tmp_path):
    new_classifier("resnet18_narrow", PREPROCESS, ["x", "y"]).save_pretrained(tmp_path)
    PREPROCESS.save(tmp_path)
    image_tower(f"hf:{tmp_path}", Preprocess(size=8, channels=1))
    with pytest.raises(BadInput, match=r"learnt from images with .*'pad'.* preprocess has .*'stretch'.* Set them"):
        image_tower(f"hf:{tmp_path}", Preprocess(size=8, channels=1, resize="stretch"))


def test_directories_of_transformers_serve_where_they_pool(tmp_path):
    sizes = {"num_channels": 1, "image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path / "vit")
    assert isinstance(image_tower(f"hf:{tmp_path / 'vit'}", PREPROCESS), ViTModel)
    with pytest.raises(BadInput, match=r"gives an error .* where a tower gives pooler_output \(1, 16\)"):
        image_tower(f"hf:{tmp_path / 'vit'}", Preprocess(size=9, channels=1))
    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(tmp_path / "resnet")
    with pytest.raises(BadInput, match=r"is a ResNetModel, and gives \(1, 8, 1, 1\) for one image of 1 x 8 x 8"):
        image_tower(f"hf:{tmp_path / 'resnet'}", PREPROCESS)


@pytest.mark.parametrize(("network", "channels", "size", "width"), [("nin", 1, 224, 384), ("lenet", 1, 28, 84)])
def test_every_kind_of_body_has_its_width(network, channels, size, width):
    with torch.device("meta"):
        tower = image_tower(network, Preprocess(size=size, channels=channels))
        found = tower(torch.zeros(2, channels, size, size)).pooler_output.shape
    assert found == (2, tower.config.hidden_size) == (2, width)


# --------------------------------------------------------------------------------------------------------- directories


def test_a_directory_gives_back_both_towers(tmp_path, task, language):
    save_clip(tmp_path, task.model, language[1], PREPROCESS)
    model, tokenizer, preprocess = load_clip(tmp_path)
    assert preprocess == PREPROCESS
    assert tokenizer.model_max_length == 16
    torch.testing.assert_close(embed_texts(model, tokenizer, CAPTIONS), embed_texts(task.model, language[1], CAPTIONS))
    for loaded in (model, VisionTextDualEncoderModel.from_pretrained(tmp_path)):
        found, expected = (embed_images(m, PIXELS, PREPROCESS) for m in (loaded, task.model))
        torch.testing.assert_close(found, expected)


def test_an_incomplete_or_mismatched_directory_is_refused(tmp_path, task, language):
    save_clip(tmp_path, task.model, language[1], PREPROCESS)
    other = language[1].__class__.from_pretrained(tmp_path)
    other.add_tokens([f"word{i}" for i in range(200)])
    other.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"384 token embeddings and a tokenizer with 584 tokens; .* do not belong"):
        load_clip(tmp_path)
    (tmp_path / "preprocess.json").unlink()
    with pytest.raises(BadInput, match="nobody knows"):
        load_clip(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(BadInput, match="has no tokenizer"):
        load_clip(tmp_path)
    new_classifier("softmax_regression", PREPROCESS, ["x", "y"]).save_pretrained(tmp_path / "classifier")
    with pytest.raises(BadInput, match="holds no image and text towers"):
        load_clip(tmp_path / "classifier")


def test_a_text_model_gives_its_states_apart(monkeypatch, language):
    whole = type("Whole", (), {})()
    whole.base_model = whole
    monkeypatch.setattr("lmkit.vision.clip.load_language_model", lambda path: (whole, language[1]))
    with pytest.raises(BadInput, match=r"somewhere is a Whole, whose states are not given apart"):
        language_model("somewhere", ModelConfig(), [], 0, 16)


def test_a_text_model_has_positions_for_the_captions_and_fits_its_tokenizer(tmp_path, language):
    with pytest.raises(BadInput, match=r"caption_length 64 is more than the text model's 16 positions\. Lower it"):
        language_model(None, ModelConfig(preset="nano", context_length=16), CAPTIONS, 384, 64)
    language[0].save_pretrained(tmp_path)
    other = language[1].__class__(tokenizer_object=language[1].backend_tokenizer, eos_token="a", pad_token="b")
    other.add_tokens([f"word{i}" for i in range(200)])
    other.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="do not belong together"):
        language_model(tmp_path, ModelConfig(), [], 0, 16)
