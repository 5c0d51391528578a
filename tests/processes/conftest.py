import pytest

from tests.faults.harness import Harness
from tests.processes.worlds import Worlds


def pytest_collection_modifyitems(items):
    for item in items:
        if "processes" in item.path.parts:
            item.add_marker(pytest.mark.processes)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    return Worlds(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """Every stage up to PPO in one process, and their sections in configs/."""
    made = Harness(tmp_path_factory.mktemp("chain"))
    made.make_chain(["tokenizer", "pretrain", "sft", "preferences", "reward", "ppo"])
    return made.folder
