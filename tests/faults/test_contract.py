"""What lmkit relies on in transformers, TRL, accelerate and torch, and what it works around: each fails by its name."""

import inspect
import os
import pickle
import re

import pytest
import torch


def test_trainers_private_hooks(tally):
    """T12 the methods that SealedCheckpoints overrides"""
    from transformers import Trainer
    from trl import RewardTrainer, SFTTrainer

    reason = "lmkit/training/sealed.py overrides this method: read it again"
    wanted = {
        "_get_output_dir": ["self", "trial"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_get_grad_norm": ["self", "model", "grad_norm"],
        "create_model_card": None,
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    }
    for cls in (Trainer, SFTTrainer, RewardTrainer):
        for name, parameters in wanted.items():
            method = getattr(cls, name, None)
            assert tally.count(callable(method)), f"{cls.__name__}.{name} is gone: {reason}"
            if parameters:
                assert tally.count(list(inspect.signature(method).parameters) == parameters), f"{name}: {reason}"
    for cls in (SFTTrainer, RewardTrainer):
        assert tally.count("_get_output_dir" not in vars(cls)), reason


def test_where_a_checkpoint_is_written(tally):
    """T12 a checkpoint is written below _get_output_dir, as checkpoint-STEP"""
    from transformers import Trainer

    source = inspect.getsource(Trainer._save_checkpoint)
    assert tally.count("_get_output_dir(trial=trial)" in source), "sealed.py redirects the folder through it"
    assert tally.count("PREFIX_CHECKPOINT_DIR" in source), "sealed.py moves checkpoint-STEP/* up"


def test_resuming_a_finished_run_takes_a_step_more(tally, tmp_path):
    """T12 train() on a run that has all its steps goes on training: why sealed.train does not call it"""
    small_trainer(tmp_path).train()
    again = small_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tally.count(again.state.global_step == 4), "transformers no longer trains on: sealed.train may call it"


def test_what_a_checkpoint_holds(tally, tmp_path):
    """T12 the files of a checkpoint"""
    small_trainer(tmp_path).train()
    files = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    wanted = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert tally.count(wanted <= files), f"{wanted - files} moved: an exact resume needs all of them"
    assert tally.count(files - wanted <= {"config.json", "generation_config.json", "training_args.bin"}), files


def small_trainer(folder):
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, num_key_value_heads=2, **sizes))
    rows = Dataset.from_list([{"input_ids": [i % 30, 1, 2], "labels": [i % 30, 1, 2]} for i in range(10)])
    arguments = TrainingArguments(
        str(folder), max_steps=3, save_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows)


def test_a_nan_is_hidden_unless_asked(tally):
    """T12 transformers hides a loss that is not finite by default"""
    from transformers import TrainingArguments

    assert tally.count(TrainingArguments("x", use_cpu=True).logging_nan_inf_filter), "sealed.arguments sets it to False"


def test_pickles_are_refused_by_torch(tally, tmp_path):
    """T12 torch.load takes tensors and plain values alone"""
    torch.save({"a": os.system}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(tmp_path / "a.pt")
    assert tally.count("Weights only load failed" in str(caught.value)), "sealed.train looks for these words"


def test_the_launcher_leaves_what_check_launcher_looks_for(tally):
    """T12 accelerate launch --cpu --num_processes 2 sets MASTER_ADDR and no WORLD_SIZE"""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    given = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "script.py"]
    arguments = launch_command_parser().parse_args(given)
    arguments.dynamo_backend = "no"
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    found = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys() and "WORLD_SIZE" not in environment
    assert tally.count(found), "lmkit.processes.check_launcher no longer sees a launcher that starts one of several"


def test_control_tokens_in_texts_stay_text(tally):
    """T12 apply_chat_template(sanitize_control_tokens=True)"""
    from transformers import PreTrainedTokenizerBase

    source = inspect.getsource(PreTrainedTokenizerBase.apply_chat_template)
    assert tally.count("sanitize_control_tokens" in source), "tokenization/chat.py gives it to foreign templates"


def test_a_state_dict_is_gathered_whole(tally):
    """T12 torch.distributed.checkpoint.state_dict keeps names without wrappers"""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = torch.nn.Linear(2, 2)
    names = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert tally.count(list(names) == ["weight", "bias"])


def test_versions_that_are_known(tally):
    """T12 the versions that these facts were seen on, or later ones of the range"""
    import accelerate
    import transformers
    import trl

    seen = {transformers: "5.17", trl: "1.16", accelerate: "1.13"}
    for module, floor in seen.items():
        found = tuple(map(int, re.findall(r"\d+", module.__version__)[:2]))
        assert tally.count(found >= tuple(map(int, floor.split(".")))), f"{module.__name__} {module.__version__}"
