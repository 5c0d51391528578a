"""Who may import whom, what may be imported at once, and what may be written to disk: read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports its own layer or a lower one; lowest first.
LAYERS = [
    {"chain", "rounds", "stage", "status", "artifact", "environment", "errors", "config", "strict_yaml", "tracking"}
    | {"masked", "processes", "model_files"},
    {"tokenization"},
    {"data", "models"},
    {"training", "generation"},
    {"report", "rl", "vision", "evaluation", "label"},
    {"cli"},
    {"recipes"},
]
# Gold labels and their evaluation must stay out of what is optimised.
OUT_OF_REACH_OF_RL = ("lmkit.evaluation", "lmkit.data.tales")
LIGHT = ["lmkit", "lmkit.config", "lmkit.stage", "lmkit.tracking", "lmkit.data.tales", "lmkit.cli"]
HEAVY = ["torch", "transformers", "trl", "datasets", "accelerate"]


def modules(root):
    """Dotted name -> file, for all modules below lmkit/ and recipes/; a folder without __init__.py has no file."""
    files = [path for folder in ("lmkit", "recipes") for path in sorted((root / folder).rglob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in files]
    folders = {".".join(name.split(".")[:depth]): None for name in names for depth in range(1, name.count(".") + 1)}
    return {**folders, **dict(zip(names, files))}


def layer(name):
    """Number of a module's layer; the package itself is in the lowest."""
    parts = name.split(".")
    part = parts[0] if parts[0] == "recipes" else parts[1] if len(parts) > 1 else None
    if part is None:
        return 0
    return next((number for number, members in enumerate(LAYERS) if part in members), None)


def imports(name, path, known):
    """(line, module of ours) for each import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))) if path else ():
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            targets = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        else:
            continue
        for target in targets:
            # Recipes see each other by bare name: their folder is first on the path.
            ours = f"recipes.{target}" if f"recipes.{target}" in known else target
            if ours.split(".")[0] in ("lmkit", "recipes"):
                yield node.lineno, ours


def broken_layers(root):
    known, broken = modules(root), []
    for name, path in known.items():
        own = layer(name)
        if own is None and path:
            broken.append(f"{path.relative_to(root)} is in no layer: add it to LAYERS")
            continue
        for line, target in imports(name, path, known):
            if layer(target) is None or layer(target) > own:
                broken.append(f"{path.relative_to(root)}:{line} imports {target}, which stands above it")
    return broken


def forbidden_paths(root, start="lmkit.rl", targets=OUT_OF_REACH_OF_RL):
    """Chains of imports from `start` to a target, one per target module reached."""
    known = modules(root)
    trails = {name: name for name in known if f"{name}.".startswith(f"{start}.")}
    queue = list(trails)
    for name in queue:
        for line, target in imports(name, known[name], known):
            parts = target.split(".")
            for depth in range(1, len(parts) + 1):  # importing a module runs the packages above it
                reached = ".".join(parts[:depth])
                if reached in known and reached not in trails:
                    trails[reached] = f"{trails[name]}:{line} -> {reached}"
                    queue.append(reached)
    return [trail for name, trail in trails.items() if f"{name}.".startswith(tuple(f"{t}." for t in targets))]


def unsafe_calls(root):
    """Lines that pickle, or that save by another mechanism than the checkpoint's own."""
    found = []
    for path in filter(None, modules(root).values()):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call | ast.Attribute) else ""
            unsafe = (
                (isinstance(node, ast.Import) and any(a.name in ("pickle", "dill", "cloudpickle") for a in node.names))
                or (isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle"))
                or (isinstance(node, ast.Call) and text.startswith("torch.save("))
                or (isinstance(node, ast.Call) and any(has(k, "allow_pickle", True) for k in node.keywords))
                or (isinstance(node, ast.Call) and any(has(k, "weights_only", False) for k in node.keywords))
                or (isinstance(node, ast.Attribute) and text.endswith("accelerator.save_state"))
                or (isinstance(node, ast.Attribute) and node.attr == "register_for_checkpointing")
            )
            if unsafe:
                found.append(f"{path.relative_to(root)}:{node.lineno} {text}")
    return found


def has(keyword, name, value):
    return keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is value


def plant(root, files):
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_layers_hold():
    assert broken_layers(ROOT) == []


def test_rl_reaches_neither_gold_nor_evaluation():
    assert forbidden_paths(ROOT) == []


def test_nothing_is_pickled():
    """But CIFAR comes as pickles, which one module reads with an unpickler that knows arrays alone."""
    assert [call for call in unsafe_calls(ROOT) if not call.startswith("lmkit/vision/cifar.py:")] == []
    assert [call.split(" ", 1)[1] for call in unsafe_calls(ROOT) if "cifar" in call] == ["import pickle"]


def test_light_modules_and_recipes_import_nothing_heavy():
    """A wrong flag must be answered in a second, so torch and its family are imported inside functions there."""
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    recipes += sorted(f"vision.{path.stem}" for path in (ROOT / "recipes" / "vision").glob("*.py"))
    script = (
        "import importlib, sys\n"
        f"for name in {[*LIGHT, *recipes]}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [other for other in {HEAVY} if other in sys.modules]\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(ROOT / 'recipes'), str(ROOT)]}\n{script}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    "line",
    [
        "import lmkit.rl.losses",
        "from lmkit.rl import losses",
        "from lmkit import rl",
        "from ..rl import losses",
        "def late():\n    from lmkit.rl.losses import f",
        "import importlib; importlib.import_module('lmkit.rl.losses')",
        "import ppo",
        "from recipes.ppo import main",
    ],
)
def test_an_import_upwards_is_named(tmp_path, line):
    root = plant(tmp_path, {"lmkit/data/shards": line, "lmkit/rl/losses": "", "recipes/ppo": ""})
    (message,) = broken_layers(root)
    assert message.startswith(f"lmkit/data/shards.py:{2 if 'late' in line else 1} imports ")


def test_an_import_downwards_is_allowed_and_a_stranger_is_not(tmp_path):
    root = plant(
        tmp_path, {"lmkit/rl/losses": "from lmkit import masked\nimport torch", "lmkit/masked": "", "recipes/a": ""}
    )
    assert broken_layers(root) == []
    assert broken_layers(plant(root, {"lmkit/utils": ""})) == ["lmkit/utils.py is in no layer: add it to LAYERS"]


@pytest.mark.parametrize(
    "files",
    [
        {"lmkit/rl/losses": "from lmkit.data import tales", "lmkit/data/tales": ""},
        {"lmkit/rl/losses": "from lmkit.generation.a import b", "lmkit/generation/a": "import lmkit.data.tales"},
        {"lmkit/rl/losses": "import lmkit.data.shards", "lmkit/data/__init__": "from . import tales"},
        {"lmkit/rl/losses": "from lmkit import evaluation", "lmkit/evaluation/label": ""},
        {"lmkit/rl/losses": "def f():\n    import lmkit.evaluation.label", "lmkit/evaluation/label": ""},
    ],
)
def test_every_way_from_rl_to_gold_is_found(tmp_path, files):
    files = {"lmkit/data/tales": "", "lmkit/data/shards": "", **files}
    trails = forbidden_paths(plant(tmp_path, files))
    assert trails
    assert all(trail.startswith("lmkit.rl.losses:") for trail in trails)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import dumps",
        "torch.load(path, weights_only=False)",
        "torch.save(model, path)",
        "numpy.load(path, allow_pickle=True)",
        "accelerator.save_state(path)",
        "self.accelerator.save_state",
        "accelerator.register_for_checkpointing(state)",
    ],
)
def test_a_pickle_is_found(tmp_path, line):
    assert unsafe_calls(plant(tmp_path, {"lmkit/a": line}))[0].startswith("lmkit/a.py:1 ")
    assert unsafe_calls(plant(tmp_path, {"lmkit/a": "torch.load(path, weights_only=True)\nnumpy.load(path)"})) == []
