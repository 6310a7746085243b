"""The registry: what the files' text says is what importing them registers."""

import subprocess
import sys

from nt_utils import definitions


def test_names_read_from_text_equal_the_registered_ones():
    assert definitions.names() == tuple(definitions.REGISTRY)
    assert [found.name for found in definitions.REGISTRY.values()] == list(definitions.names())
    assert definitions.names()[0] == "as written"


def test_every_definition_names_its_paper_formula_and_steps():
    for found in definitions.REGISTRY.values():
        module = sys.modules[found.function.__module__]
        assert "1. " in module.__doc__ and "3. " in module.__doc__, module.__name__
        assert found.function.__doc__ and set(found.needs) <= set(definitions.Material.__dataclass_fields__)


def test_names_are_known_without_torch():
    code = "import sys; from nt_utils import definitions; definitions.names(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
