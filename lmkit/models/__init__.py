"""Language models. Importing this package makes lmkit's own families known to transformers' Auto classes.

    import lmkit.models
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("runs/lstm/pretrain/model")      # in any order of the two imports

A family is a module of this package that registers its classes when it is imported. That takes torch, and a
configuration is to be read without it: so the families are imported when transformers' own classes are, not before.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

FAMILIES = ("transformer", "encoder_decoder", "recurrent", "neural_ngram")
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
# Modules that may import the Auto classes while families need them: what is half imported is not asked for a name.
_WATCHED = (_AUTO_CLASSES, "transformers.modeling_layers", "lmkit.models.")


def _import_families() -> None:
    for name in FAMILIES:
        importlib.import_module(f"lmkit.models.{name}")


class _ThenFamilies(MetaPathFinder):
    """Imports all families once the Auto classes are there and no watched module is half imported."""

    depth = 0

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(_WATCHED):
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_then_register(module):
            self.depth += 1
            try:
                execute(module)
                if self.depth == 1 and _AUTO_CLASSES in sys.modules:
                    _import_families()
                    sys.meta_path.remove(self)
            finally:
                self.depth -= 1

        spec.loader.exec_module = execute_then_register
        return spec


if _AUTO_CLASSES in sys.modules:
    _import_families()
else:
    sys.meta_path.insert(0, _ThenFamilies())
