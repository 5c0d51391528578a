"""Whatever is imported first, the Auto classes know lmkit's own families; and reading a configuration is cheap."""

import subprocess
import sys

import pytest

ORDERS = [
    "import lmkit.models; from transformers import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM; import lmkit.models",
    "import lmkit.models; import transformers.modeling_layers",
    "import lmkit.models.layer",
    "import lmkit.models.encoder_decoder",
    "import lmkit.models.language_model",
    "import lmkit.models.load",
    "import lmkit.generation.chat",
]
CHECK = (
    "; from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForCausalLM as A"
    "; import lmkit.models as m"
    "; assert all(f'lmkit.models.{name}' in sys.modules for name in m.FAMILIES)"
    "; config = AutoConfig.for_model('lmkit_transformer', num_hidden_layers=1)"
    "; assert type(A.from_config(config)).__name__ == 'TransformerForCausalLM'"
    "; assert 'lmkit' not in str(sys.meta_path)"
)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_families_are_registered_in_any_order_of_imports(order):
    subprocess.run([sys.executable, "-c", f"import sys; {order}{CHECK}"], check=True)


def test_the_package_itself_is_light_and_one_import_registers_all():
    light = "import sys; import lmkit.models.presets; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{light}; {ORDERS[4]}{CHECK}"], check=True)
