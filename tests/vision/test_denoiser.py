"""Networks, conditions, drawing and directories: what must not matter does not, and what must does."""

import json

import pytest
import torch

from lmkit.errors import BadInput
from lmkit.models.presets import ModelConfig
from lmkit.vision.conditioning import new_conditioner, without_some
from lmkit.vision.denoiser import Denoiser, draw, drawing, held_out_loss, to_pixels
from lmkit.vision.diffusion_options import DiTOptions, ProcessOptions, SamplingOptions, UNetOptions
from lmkit.vision.dit import new_dit, places
from lmkit.vision.options import Preprocess
from lmkit.vision.pipeline import load_pipeline, save_pipeline
from lmkit.vision.pixels import normalize

PREPROCESS = Preprocess(size=8, channels=1, mean=[0.5], std=[0.5])
PIXELS = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS = ["a three left of a seven", "a seven left of a three", "a one", "a two", "the number four", "a one"]
EPS, V = ProcessOptions(objective="eps", schedule="linear"), ProcessOptions(objective="v", schedule="cosine")
QUICK = SamplingOptions(num_inference_steps=3)
WORDS = {"text": CAPTIONS, "class": ["one", "two", "two", "one", "six", "one"], "none": [""] * 6}


def conditioner(kind="text", source=None, frozen=False):
    torch.manual_seed(0)
    new = ModelConfig(preset="nano", num_hidden_layers=1, context_length=32)
    return new_conditioner(kind, WORDS[kind], source, new, 384, 24, frozen)


def build(network="dit", kind="text", process=None, drop=0.1, preprocess=PREPROCESS):
    condition = conditioner(kind)
    if network == "dit":
        net = new_dit(DiTOptions(hidden_size=32, num_hidden_layers=1), preprocess, condition)
    else:
        pytest.importorskip("diffusers", reason="the vision extra is not installed")
        from lmkit.vision.unet import new_unet

        net = new_unet(UNetOptions(widths=[8, 16], num_layers=1, num_heads=2), preprocess, condition)
    model = Denoiser(net, condition, process or ProcessOptions(), preprocess, drop).eval()
    for parameter in model.network.parameters():  # the heads that start at 0 say something too
        with torch.no_grad():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def batch(model, words=None):
    return model.conditioner.tensors(words or WORDS[model.conditioner.kind])


def conditions(model, words):
    return model.conditioner(**model.conditioner.tensors(words))


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))

# ------------------------------------------------------------------------------------------------------------ training


def test_the_loss_is_the_sum_of_mean_squares_and_is_counted():
    """A new DiT predicts 0, so its loss is the mean square of the target: of noise minus image."""
    model = Denoiser(new_dit(DiTOptions(hidden_size=32), PREPROCESS, conditioner()), conditioner(), V, PREPROCESS)
    loss, count = model.eval()(PIXELS, **batch(model))
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(1000, (6,), generator=generator)
    noise, clean = torch.randn(PIXELS.shape, generator=generator), normalize(PIXELS, PREPROCESS)
    alpha, sigma = (v[level].float().view(-1, 1, 1, 1) for v in (model.schedule.alphas, model.schedule.sigmas))
    torch.testing.assert_close(loss, (alpha * noise - sigma * clean).square().mean((1, 2, 3)).sum())
    assert count == 6
    assert held_out_loss(model, PIXELS, CAPTIONS) == pytest.approx(loss.item() / 6)


def test_evaluation_is_always_the_same_and_training_never():
    model = build()
    assert model(PIXELS, **batch(model))[0] == model(PIXELS, **batch(model))[0]
    model.train()
    assert model(PIXELS, **batch(model))[0] != model(PIXELS, **batch(model))[0]


@pytest.mark.parametrize("kind", ["text", "class"])
def test_the_condition_is_left_out_of_a_share_of_the_images(kind):
    model = build(kind=kind, drop=0.999999).train()
    losses = []
    for words in (WORDS[kind], WORDS[kind][::-1]):
        torch.manual_seed(2)
        losses.append(model(PIXELS, **batch(model, words))[0])
    assert losses[0] == losses[1]
    model.drop_condition = 0.0
    losses = []
    for words in (WORDS[kind], WORDS[kind][::-1]):
        torch.manual_seed(2)
        losses.append(model(PIXELS, **batch(model, words))[0])
    assert losses[0] != losses[1]


def test_what_is_left_out_is_the_empty_caption():
    model = build()
    dropped = without_some(model.conditioner, batch(model), torch.tensor([True, False, True, True, True, True]))
    empty = model.conditioner.tensors([""] * 6)
    assert dropped["attention_mask"].sum(1).tolist() == [1, *batch(model)["attention_mask"].sum(1)[1:2], 1, 1, 1, 1]
    assert torch.equal(dropped["input_ids"][0, :1], empty["input_ids"][0])
    assert torch.equal(dropped["input_ids"][1], batch(model)["input_ids"][1])


def test_a_frozen_reader_does_not_learn(tmp_path):
    reader = conditioner()
    from lmkit.models.presets import build_model

    language_model = build_model(ModelConfig(preset="nano", context_length=32), reader.tokenizer)
    language_model.save_pretrained(tmp_path)
    reader.tokenizer.save_pretrained(tmp_path)
    frozen, free = (conditioner(source=tmp_path, frozen=frozen) for frozen in (True, False))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in free.parameters())
    assert getattr(free.encoder.config, "is_causal", True)


# ---------------------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_padding_of_captions_changes_nothing(network):
    model = build(network)
    with torch.no_grad():
        short = model.predict(X[:1], 500, conditions(model, ["a one"]))
        padded = model.predict(X, 500, conditions(model, ["a one", CAPTIONS[0]]))
    torch.testing.assert_close(padded[:1], short, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_captions_are_told_apart_by_their_order_alone(network):
    model = build(network)
    with torch.no_grad():
        first, second = (model.predict(X, 500, conditions(model, [caption] * 2)) for caption in CAPTIONS[:2])
    assert (first - second).abs().max() > 1e-4


def test_a_new_reader_reads_both_ways_padded_or_not():
    """The first word's state changes with a word after it; a causal reader's would not."""
    reader = conditioner()
    for company in ([], ["a three left of a seven right of it"]):
        states = [
            reader(**reader.tensors([text, *company]))["encoder_hidden_states"][0, 0]
            for text in ("a three left of", "a three right of")
        ]
        assert (states[0] - states[1]).abs().max() > 1e-3


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_classes_and_none_are_told_apart(network):
    model = build(network, "class")
    with torch.no_grad():
        labels = model.conditioner.tensors(["one", "two"])
        same = X[:1].expand(2, -1, -1, -1)
        found = model.predict(same, 500, model.conditioner(**labels))
        none = model.predict(same, 500, model.conditioner(**model.conditioner.empty(labels)))
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert (found[0] - none[0]).abs().max() > 1e-4


def test_the_dit_knows_where_a_square_is():
    model = build()
    moved = X.roll(2, 3)
    with torch.no_grad():
        given = conditions(model, CAPTIONS[:2])
        assert not torch.allclose(model.predict(moved, 9, given), model.predict(X, 9, given).roll(2, 3), atol=1e-3)


def test_places_are_all_different_and_as_loud_as_what_stands_there():
    """Neighbours and places half an image apart alike; learnt from near 0 instead, the two halves became one."""
    found = places(4, 128)
    assert found.norm(dim=1).tolist() == pytest.approx([8.0] * 16)
    apart = torch.cdist(found, found) + 99 * torch.eye(16)
    assert apart.min() > 1.9
    assert apart[0, 2] > 3.5


# ------------------------------------------------------------------------------------------------------------- drawing


def test_pixels_come_back():
    assert torch.equal(to_pixels(normalize(PIXELS, PREPROCESS), PREPROCESS), PIXELS)


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_an_image_depends_on_its_seed_and_number_alone(sampler):
    model, options = build(), QUICK.model_copy(update={"sampler": sampler})
    together = draw(model, CAPTIONS, options, seed=1)
    apart = draw(model, CAPTIONS, options, seed=1, batch_size=2)
    assert (together.int() - apart.int()).abs().max() <= 1
    assert torch.equal(draw(model, CAPTIONS, options, seed=1), together)
    assert not torch.equal(draw(model, CAPTIONS, options, seed=2), together)
    assert not torch.equal(together[2], together[5])  # the same caption, another number


def test_guidance_1_is_the_condition_and_0_is_none():
    model = build()
    scaled = {s: draw(model, CAPTIONS, QUICK.model_copy(update={"guidance_scale": s})) for s in (0.0, 1.0, 3.0)}
    asked = []
    predict = model.predict
    model.predict = lambda x, level, given: asked.append(given) or predict(x, level, given)
    for scale, words in ((1.0, CAPTIONS), (0.0, [""] * 6)):
        asked.clear()
        assert torch.equal(draw(model, words, QUICK), scaled[scale])
        draw(model, CAPTIONS, QUICK.model_copy(update={"guidance_scale": scale}))
        assert len(asked) == 6  # two images of three steps, one prediction each: what is not needed is not computed
    assert not torch.equal(scaled[3.0], scaled[1.0])


def test_guidance_goes_on_beyond_the_condition():
    """A network that predicts a hundredth of the number of tokens, 1 without caption: with scale 3, 1 + 3 (n - 1)."""
    model, one = build(), SamplingOptions(num_inference_steps=1, guidance_scale=3.0)
    lengths = batch(model)["attention_mask"].sum(1).view(-1, 1, 1, 1)
    model.predict = lambda x, level, given: given["encoder_attention_mask"].sum(1).view(-1, 1, 1, 1) / 100 + 0 * x
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(6)])
    wanted = to_pixels(noise - (1 + 3 * (lengths - 1)) / 100, PREPROCESS)
    assert (draw(model, CAPTIONS, one).int() - wanted.int()).abs().max() <= 1


def test_every_step_is_shown():
    assert len(list(drawing(build(), CAPTIONS, QUICK))) == 3


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("class", ["five"], "the model knows no class five. It knows one, six, two"),
        ("none", ["a five"], "the model draws after nothing, but was told 'a five'"),
        ("text", ["a one " * 30], "1 captions have 24 tokens or more. Shorten them, or raise caption_length"),
    ],
)
def test_words_the_model_cannot_be_told_are_refused(kind, words, message):
    with pytest.raises(BadInput, match=message):
        draw(build(kind=kind), words, QUICK)


@pytest.mark.parametrize(
    ("kind", "drop", "message"),
    [("none", 0.1, "the model has no condition: only 1 goes"), ("text", 0.0, "never sees its condition left out")],
)
def test_guidance_needs_a_condition_that_was_left_out(kind, drop, message):
    with pytest.raises(BadInput, match=f"guidance_scale is 2.0, but .*{message}"):
        draw(build(kind=kind, drop=drop), WORDS[kind], QUICK.model_copy(update={"guidance_scale": 2.0}))


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        ("unet", 9, r"images of 9 x 9 cannot be halved 1 times.* Set preprocess.size to a multiple of 2"),
        ("dit", 9, r"images of 9 x 9 are not filled by squares of 2"),
    ],
)
def test_images_that_do_not_fit_the_network_are_refused(network, size, message):
    with pytest.raises(BadInput, match=message):
        build(network, preprocess=PREPROCESS.model_copy(update={"size": size}))


def test_sizes_that_do_not_divide_are_refused():
    pytest.importorskip("diffusers", reason="the vision extra is not installed")
    from lmkit.vision.unet import new_unet

    with pytest.raises(BadInput, match=r"unet.widths \[12\]: wanted multiples of 8 and of num_heads 4"):
        new_unet(UNetOptions(widths=[12]), PREPROCESS, conditioner("none"))
    with pytest.raises(BadInput, match=r"dit.hidden_size 40 is no multiple of 32"):
        new_dit(DiTOptions(hidden_size=40), PREPROCESS, conditioner("none"))
    with pytest.raises(ValueError, match="objective flow with schedule linear: wanted flow with straight"):
        ProcessOptions(schedule="linear")


# --------------------------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize(
    ("network", "kind", "process"),
    [("dit", "text", None), ("dit", "class", EPS), ("unet", "text", V), ("unet", "class", None), ("unet", "none", EPS)],
)
def test_a_directory_draws_the_same(tmp_path, network, kind, process):
    model = build(network, kind, process)
    save_pipeline(tmp_path, model, QUICK)
    loaded, sampling = load_pipeline(tmp_path)
    assert sampling == QUICK
    assert loaded.drop_condition == 0.1
    assert torch.equal(draw(loaded, WORDS[kind], sampling), draw(model, WORDS[kind], sampling))
    assert (tmp_path / "model_index.json").is_file() == (kind == "none")


def test_plain_diffusers_and_transformers_draw_the_same(tmp_path):
    """The page on images has these lines."""
    model = build("unet", "text")
    save_pipeline(tmp_path, model, QUICK)
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
    from transformers import AutoModel, AutoTokenizer

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    reader = AutoModel.from_pretrained(tmp_path / "text_encoder")
    ids = tokenizer([CAPTIONS[0] + tokenizer.eos_token], return_tensors="pt").input_ids
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(sigmas=[1 - i / 3 for i in range(3)])
    with torch.no_grad():
        states = reader(ids).last_hidden_state
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, states).sample, t, x).prev_sample
    expected = draw(model, CAPTIONS[:1], QUICK).int()
    assert (((x / 2 + 0.5).clamp(0, 1) * 255).round().int() - expected).abs().max() <= 1


def test_a_pipeline_of_diffusers_draws_the_same_without_condition(tmp_path):
    model = build("unet", "none", EPS)
    save_pipeline(tmp_path, model, QUICK)
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    images = pipeline(2, generators, num_inference_steps=3, output_type="np").images
    expected = draw(model, ["", ""], QUICK.model_copy(update={"sampler": "ddpm"})).permute(0, 2, 3, 1).int()
    assert (torch.from_numpy(images * 255).round().int() - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("diffusion.json", "has no diffusion.json; wanted a directory that recipes/vision/diffusion.py wrote"),
        ("transformer", "has neither unet/ nor transformer/"),
        ("tokenizer", "has no tokenizer/, which a model with captions needs"),
        ("transformer/model.safetensors", "is not whole: .* Make the model again"),
        ("preprocess.json", "nobody knows how"),
    ],
)
def test_an_incomplete_directory_is_refused(tmp_path, remove, message):
    save_pipeline(tmp_path, build(), QUICK)
    (tmp_path / remove).rename(tmp_path.parent / f"{tmp_path.name}-{remove.replace('/', '-')}")
    with pytest.raises(BadInput, match=message):
        load_pipeline(tmp_path)


def test_a_directory_that_was_edited_is_refused(tmp_path):
    save_pipeline(tmp_path, build(), QUICK)
    record = json.loads((tmp_path / "diffusion.json").read_text())
    (tmp_path / "diffusion.json").write_text(json.dumps(record | {"condition": "sound"}))
    with pytest.raises(BadInput, match="condition"):
        load_pipeline(tmp_path)
    (tmp_path / "diffusion.json").write_text("{")
    with pytest.raises(BadInput, match="is not readable JSON"):
        load_pipeline(tmp_path)
    (tmp_path / "diffusion.json").write_text(json.dumps(record))
    (tmp_path / "transformer" / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(BadInput, match="auto_map"):
        load_pipeline(tmp_path)
