"""Nothing that is read is code: no pickle, no remote code unless the user says so, weights from safetensors alone."""

import ast
import dataclasses
from pathlib import Path

import pytest

from hf_pdprune.trainer import PDPruneConfig


ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("src", "recipes") for path in (ROOT / folder).rglob("*.py"))
# The GGUF file of the demo is none of safetensors; it is no pickle either.
GGUF = ROOT / "recipes" / "smollm2-135m" / "get_model.py"


def calls(path):
    """Dotted name, argument names (`None` for **) and node of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


@pytest.mark.invariant
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_run(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert imported.isdisjoint({"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
    for name, arguments in calls(path):
        assert name not in ("eval", "exec", "compile", "torch.load", "yaml.load", "numpy.load", "np.load"), name
        trusted = arguments.get("trust_remote_code")
        # What the user says is trl's own option, see below.
        assert trusted is None or ast.unparse(trusted) in ("False", "args.trust_remote_code"), name


@pytest.mark.invariant
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_weights_are_read_from_safetensors(path):
    for name, arguments in calls(path):
        if name == "AutoModelForCausalLM.from_pretrained" and path != GGUF:
            in_text = "use_safetensors" in arguments
            # load_stages puts it into what it is given
            assert in_text or (path.name == "load_stages.py" and None in arguments), f"{path.name}: {name}"


@pytest.mark.invariant
def test_remote_code_is_what_the_user_asks_for_alone():
    assert PDPruneConfig("out").trust_remote_code is False
    fields = {field.name: field.default for field in dataclasses.fields(PDPruneConfig)}
    assert fields["trust_remote_code"] is False
