"""Language models. Importing this package makes lmkit's own families known to transformers' Auto classes.

    import lmkit.models
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("runs/lstm/pretrain/model")      # in any order of the two imports

A family is a module of this package that registers its classes when it is imported. That takes torch, and a
configuration is to be read without it: so the families are imported when transformers' own models are, not before.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

FAMILIES: tuple[str, ...] = ("neural_ngram",)
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def _import_families() -> None:
    for name in FAMILIES:
        importlib.import_module(f"lmkit.models.{name}")


class _AfterAutoClasses(MetaPathFinder):
    """Imports the families right after the module of the Auto classes, whoever imports that."""

    def find_spec(self, name, path=None, target=None):
        if name != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _import_families()

        spec.loader.exec_module = execute_and_register
        return spec


if _AUTO_CLASSES in sys.modules:
    _import_families()
else:
    sys.meta_path.insert(0, _AfterAutoClasses())
