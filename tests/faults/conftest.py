"""The reference chain, made once, and the table at the end: name, tried, passed, figure."""

import os

import pytest

from tests.faults.harness import Harness


def pytest_collection_modifyitems(items):
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def everything():
    """Whether to try all there is (FAULTS=all), or a sample of it."""
    return os.environ.get("FAULTS", "few") == "all"


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    made = Harness(tmp_path_factory.mktemp("faults"))
    made.make_chain()
    return made


class Tally:
    """Counts what was tried and what held; `figure` is what else the line says."""

    def __init__(self, name):
        self.name, self.tried, self.passed, self.figure = name, 0, 0, ""

    def count(self, held, number=1):
        self.tried += number
        self.passed += number * bool(held)
        return held


@pytest.fixture
def tally(request):
    """The test's line in the table, from the first line of its docstring."""
    made = Tally((request.function.__doc__ or request.node.name).strip().split("\n")[0])
    yield made
    kind = request.node.name.partition("[")[2].rstrip("]")
    if kind and made.figure:  # tests without a figure of their own are one line together
        made.name += f" [{kind}]"
    request.node.user_properties.append(("tally", vars(made)))  # these travel from the processes of xdist


def pytest_terminal_summary(terminalreporter):
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", "") == "teardown"]
    lines = {}
    for tally in (dict(report.user_properties).get("tally") for report in reports):
        if tally and tally["tried"]:
            line = lines.setdefault(tally["name"], tally | {"tried": 0, "passed": 0})
            line["tried"] += tally["tried"]
            line["passed"] += tally["passed"]
    if lines:
        terminalreporter.write_sep("=", "faults: what was tried, what held")
    for name, line in sorted(lines.items()):
        counts = f"tried {line['tried']:>5}  passed {line['passed']:>5}"
        terminalreporter.write_line(f"{name:<86} {counts}  {line['figure']}")
