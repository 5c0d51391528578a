"""The tree in README.md is the repository's: nothing missing from it, nothing in it that is gone."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tree(readme):
    """Lines of the fenced block under the first heading that names a tree, else of the first that shows lmkit/."""
    blocks = list(re.finditer(r"^```[^\n]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL))
    heading = re.search(r"^#+ .*\btree\b", readme, re.MULTILINE | re.IGNORECASE)
    after = [block[1] for block in blocks if heading and block.start() > heading.start()]
    showing = [block[1] for block in blocks if "lmkit/" in block[1]]
    candidates = after[:1] or showing[:1]
    assert candidates, "README.md has no fenced block with the tree of the repository (one that shows lmkit/)"
    return candidates[0].splitlines()


def below(lines, folder):
    """Text of the entry `folder/` and of what is indented under it."""
    columns = [re.search(r"[\w.]|$", line).start() for line in lines]
    for number, (line, column) in enumerate(zip(lines, columns)):
        if line[column:].startswith(f"{folder}/"):
            rest = range(number + 1, len(lines))
            inside = itertools.takewhile(lambda n, column=column: columns[n] > column or not lines[n].strip(), rest)
            return "\n".join(lines[n] for n in (number, *inside))
    return ""


def missing(lines, files):
    """Top-level folders, modules and subpackages of lmkit, and recipes among `files` that the tree does not name."""
    wanted = {(None, f"{file.split('/')[0]}/") for file in files if "/" in file}
    for file in files:
        top, *rest = file.split("/")
        if top in ("lmkit", "recipes") and rest and rest != ["__init__.py"]:
            if len(rest) == 1 and rest[0].endswith(".py"):
                wanted.add((top, rest[0]))
            elif top == "lmkit" and len(rest) > 1:
                wanted.add((top, f"{rest[0]}/"))
    absent = []
    for folder, name in sorted(wanted, key=str):
        text = below(lines, folder) if folder else "\n".join(lines)
        if not re.search(rf"(?<![\w.-]){re.escape(name)}" + r"(?!\w)" * name.endswith(".py"), text):
            absent.append(f"{folder}/{name}" if folder else name)
    return absent


def gone(lines, root):
    """Entries that begin a line and exist neither at the top nor in lmkit/ or recipes/."""
    entries = [match[0] for line in lines if (match := re.search(r"[\w.][\w./-]*(?=\s|$)", line))]
    entries = [entry for entry in entries if entry.endswith(("/", ".py"))]
    return [e for e in entries if not any((root / folder / e).exists() for folder in ("", "lmkit", "recipes"))]


def test_the_tree_names_everything():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert missing(tree((ROOT / "README.md").read_text()), listing.splitlines()) == []


def test_the_tree_names_nothing_that_is_gone():
    assert gone(tree((ROOT / "README.md").read_text()), ROOT) == []


EXAMPLE = """# lmkit
```
make rlhf
```
## The tree
```
lmkit/
  config.py     load
  rl/           ppo, evaluation.py
recipes/        ppo.py
```
"""


@pytest.mark.parametrize(
    ("file", "absent"),
    [
        ("lmkit/config.py", []),
        ("lmkit/__init__.py", []),
        ("lmkit/rl/losses.py", []),
        ("recipes/ppo.py", []),
        ("lmkit/fig.py", ["lmkit/fig.py"]),
        ("lmkit/vision/cnn.py", ["lmkit/vision/"]),
        ("recipes/evaluation.py", ["recipes/evaluation.py"]),
        (".ci/run", [".ci/"]),
    ],
)
def test_what_a_tree_lacks_is_found(file, absent):
    assert missing(tree(EXAMPLE), [file]) == absent


def test_what_a_tree_has_too_much_is_found(tmp_path):
    (tmp_path / "lmkit" / "rl").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    assert gone(tree(EXAMPLE), tmp_path) == ["config.py"]
