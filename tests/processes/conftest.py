import pytest

from tests.processes.worlds import Worlds


def pytest_collection_modifyitems(items):
    for item in items:
        if "processes" in item.path.parts:
            item.add_marker(pytest.mark.processes)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    return Worlds(tmp_path_factory.mktemp("worlds"))
