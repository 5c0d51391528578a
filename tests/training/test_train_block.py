"""A `train:` section is checked without importing TRL, and as TRL would."""

import dataclasses
import subprocess
import sys

import pytest

from lmkit.training.train_block import SET_BY_STAGE, check_train_block, field_types


@pytest.mark.parametrize("name", ["SFTConfig", "RewardConfig"])
def test_the_fields_are_those_of_the_class(name):
    import trl

    fields = {field.name for field in dataclasses.fields(getattr(trl, name))}
    assert set(field_types(name)) == fields


def test_what_the_stages_set_are_fields_of_one_of_the_classes():
    assert set(SET_BY_STAGE) <= field_types("SFTConfig").keys() | field_types("RewardConfig").keys()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"learning_rte": 1e-3}, "learning_rte: unknown option of SFTConfig. Did you mean learning_rate?"),
        ({"max_steps": 8.5}, "max_steps: Input should be a valid integer"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: Input should be 'linear', 'cosine'"),
        ({"max_steps": 5, "num_train_epochs": 3}, "num_train_epochs 3: not read beside max_steps 5. Set max_steps -1"),
        ({"bf16": "perhaps"}, "bf16: Input should be a valid boolean"),
        ({"output_dir": "x"}, "output_dir: is set by the stage; remove it. Instead: --output_dir."),
    ],
)
def test_a_mistake_is_named(block, message):
    with pytest.raises(ValueError, match=message[:40].replace("?", r"\?")) as error:
        check_train_block(block, "SFTConfig")
    assert message in str(error.value)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ValueError, match="max_stps") as error:
        check_train_block({"max_stps": 1, "learning_rate": "fast"}, "RewardConfig")
    assert len(str(error.value).split("\n")) == 2


def test_values_are_converted_and_accepted_by_the_class():
    from trl import SFTConfig

    block = check_train_block({"max_steps": "3", "learning_rate": "1e-3", "optim": "adamw_torch"}, "SFTConfig")
    assert block == {"max_steps": 3, "learning_rate": 1e-3, "optim": "adamw_torch"}
    assert SFTConfig(**block, use_cpu=True, bf16=False).max_steps == 3


def test_checking_imports_neither_torch_nor_trl():
    code = (
        "import sys; from lmkit.training.train_block import check_train_block as c; "
        "c({'max_steps': 1}, 'SFTConfig'); print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
