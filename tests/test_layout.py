import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[1] / "src" / "hf_pdprune"
# Data flows down this list: a file imports only from those above it.
LAYERS = [
    "version",
    "artefact_file",
    "run_folder",
    "weight_files",
    "evaluating",
    "own_attribute",
    "spread_weights",
    "shortened_config",
    "blocks",
    "exclusive_use",
    "pair_layout",
    "plan_parts",
    "plan",
    "fingerprint",
    "adapters",
    "projected_blocks",
    "data",
    "kv",
    "inference",
    "search",
    "hub",
    "trainer",
    "evaluation",
    "integrations",
]
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]


def layer_of(path):
    return path.parts[0].removesuffix(".py")


def imported_layers(path):
    """The parts of the package that a file imports from, those for type checking left out."""
    tree = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    checked = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.parts[: len(path.parts) - node.level]
            target = (*package, *(node.module or "").split("."))
            names = [target] if node.module else [(*package, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [tuple((node.module or "").split("."))]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        for name in names:
            if isinstance(node, ast.ImportFrom) and node.level:
                yield name[0]
            elif name[0] == "hf_pdprune":
                yield f"{'.'.join(name)} (not relative)"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_only_from_above(path):
    if path == Path("__init__.py"):
        return
    layer = layer_of(path)
    assert layer in LAYERS, f"{layer} has no place in the order of layers"
    above = LAYERS[: LAYERS.index(layer)]
    for imported in imported_layers(path):
        assert imported == layer or imported in above, f"{path} imports from {imported}"


def test_the_order_is_complete():
    for layer in LAYERS[: LAYERS.index("inference") + 1]:
        assert (SOURCE / layer).is_dir() or (SOURCE / f"{layer}.py").is_file()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short(path):
    lines = (SOURCE / path).read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{path} has {lines} lines: split it"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_names_and_docstrings(path):
    assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")
    tree = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    if path.name != "version.py":
        assert ast.get_docstring(tree), f"{path} has no docstring"
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    for node in public:
        assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def config_classes():
    for path in MODULES:
        if path.name.endswith("_config.py"):
            module = importlib.import_module(".".join(("hf_pdprune", *path.with_suffix("").parts)))
            for name, value in vars(module).items():
                if dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                    yield pytest.param(value, id=name)


@pytest.mark.parametrize("config", list(config_classes()))
def test_options_are_documented(config):
    """Every option has a help text for the command line and stands in the docstring, in order."""
    docstring = inspect.getdoc(config)
    own = [field for field in dataclasses.fields(config) if field.name in vars(config).get("__annotations__", {})]
    assert own
    listed = []
    for field in own:
        assert field.metadata.get("help"), f"{config.__name__}.{field.name} has no help"
        listed.append(docstring.find(f"{field.name} (`"))
        inherited = any(field.name in getattr(base, "__dataclass_fields__", {}) for base in config.__mro__[1:])
        assert listed[-1] >= 0 or inherited, f"{config.__name__}.{field.name} is not in the docstring"
    places = [place for place in listed if place >= 0]
    assert places == sorted(places)
