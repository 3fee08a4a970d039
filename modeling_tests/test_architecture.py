"""The floors of the house, read from its source: what may import what, what must not exist, and how errors speak.

Every rule is a function of one tree of files, so that it can be shown a fault as well as this project.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).resolve().parents[1]
# Read, not imported, so that the rules still speak when the package does not load.
SENSOR_IDS = set(re.findall(r'\bid="(\w+)"', (ROOT / "src/msgfm_hf/model/sensors.py").read_text(encoding="utf-8")))
FLOORS = {"model": 0, "data": 1, "tasks": 2, "hub": 3, "scene": 3, "train": 3, "convert": 3, "cli": 4}
MODEL_MAY_IMPORT = {"torch", "numpy", "transformers", "huggingface_hub", *sys.stdlib_module_names}
NEVER_IMPORTED = {"torchvision", "timm", "torchgeo", "lightning", "pytorch_lightning"}
NEVER_A_NAME = {"utils", "common", "misc", "helpers", "base"}
TEXT = {".py", ".md", ".yaml", ".toml", ".json", ".cff", ".txt", ""}
NOT_OURS = {"runs", "shards", "dist", "__pycache__"}
MACHINE_PATH = re.compile(r"(?<![\w.$}~*-])/(?:home|root|tmp|work|mnt|opt|Users|private|workspace)/\w")
READ_BY_TRANSFORMERS = {"output_router_logits"}  # the default of the forward argument of that name
RECIPE_HEADER = ("command", "hardware", "time", "result")


def files(folder):
    """Every file of the project below `folder`; what the tools leave behind is not part of it."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif path.name == ".ci" or not (path.name.startswith(".") or path.name in NOT_OURS):
            yield from files(path)


def sources(root):
    """(path inside the package, its syntax tree) of every Python file of the package."""
    package = root / "src" / "msgfm_hf"
    for path in files(package):
        if path.suffix == ".py":
            yield path.relative_to(package), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree, here):
    """(line, dotted name, guarded) of every import below `tree`; relative ones are resolved from the file `here`."""
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type or node) for h in node.handlers)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, node in guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["msgfm_hf", *here.parts[:-1]][: len(here.parts) - node.level + 1] if node.level else []
            origin = [*above, *filter(None, [node.module])]
            yield from ((node.lineno, ".".join([*origin, alias.name]), node in guarded) for alias in node.names)


def import_directions(root):
    for here, tree in sources(root):
        room = Path(here.parts[0]).stem
        if here.parts != ("__init__.py",) and room not in FLOORS:
            yield f"{here}: the package has no room {room!r}"
            continue
        for line, name, _ in imports(tree, here):
            parts = name.split(".")
            if parts[0] in NEVER_IMPORTED:
                yield f"{here}:{line}: {parts[0]} is never imported"
            if parts[0] != "msgfm_hf":
                continue
            target = parts[1] if len(parts) > 1 and parts[1] in FLOORS else "model"
            if here.parts == ("__init__.py",):
                up = target != "model"
            else:
                up = target != room and FLOORS[target] >= FLOORS[room]
            if up:
                yield f"{here}:{line}: imports point down only, {room} does not import {target}"


def ground_floor(root):
    for here, tree in sources(root):
        if here.parts[0] != "model":
            continue
        if len(here.parts) > 2:
            yield f"{here}: model/ is flat"
            continue
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        for node in relative:
            if node.level > 1 or not node.module or "." in node.module:
                yield f"{here}:{node.lineno}: inside model/ only `from .module import Name`"
        for line, name, guarded in imports(tree, here):
            top = name.split(".")[0]
            optional = guarded and top == "tifffile" and here.name == "image_processing_msgfm.py"
            own = line in {node.lineno for node in relative}
            if top not in MODEL_MAY_IMPORT and not optional and not own:
                yield f"{here}:{line}: model/ does not import {top}"
        path = root / "src" / "msgfm_hf" / here
        for name in sorted(set(get_relative_imports(path)) - {node.module for node in relative}):
            yield f"{here}: text looks like a relative import of {name!r} to the Hub's loader"
        for name in sorted(get_relative_imports(path)):
            if not (path.parent / f"{name}.py").exists():
                yield f"{here}: the Hub's loader finds no file for {name!r}"


def names(root):
    for path in files(root):
        inside = path.relative_to(root)
        if NEVER_A_NAME & {Path(part).stem for part in inside.parts}:
            yield f"{inside}: the name says nothing; name it after what it holds"


def no_behaviour_by_sensor(root):
    def sensor_ids(node, containers):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)) and containers:
            return {found for element in node.elts for found in sensor_ids(element, False)}
        return {node.value} & SENSOR_IDS if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()

    for here, tree in sources(root):
        if here.parts == ("model", "sensors.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.MatchValue):
                found = sensor_ids(node.value, False)
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                found = sensor_ids(node.left, False) | sensor_ids(node.comparators[0], False)
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
                found = sensor_ids(node.comparators[0], True)
            else:
                continue
            if found:
                where = f"{here}:{getattr(node, 'lineno', '?')}"
                yield f"{where}: behaviour is chosen by sensor {sorted(found)}; put it into SensorSpec"


def no_machine_paths(root):
    for path in files(root):
        if path.suffix in TEXT and path.name != "LICENSE":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if MACHINE_PATH.search(line):
                    yield f"{path.relative_to(root)}:{number}: a path of one machine"


def recipes(root):
    for path in files(root / "src" / "msgfm_hf" / "recipes"):
        text = path.read_text(encoding="utf-8")
        header = re.match(r"(#[^\n]*\n|\n)*", text).group().lower()
        for word in RECIPE_HEADER:
            if f"{word}:" not in header:
                yield f"{path.name}: the header does not say `{word}:`"


def config_fields_are_read(root):
    config = root / "src" / "msgfm_hf" / "model" / "configuration_msgfm.py"
    fields = {
        statement.target.id: statement.lineno
        for node in ast.parse(config.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and not statement.target.id.startswith("_")
    }
    read = READ_BY_TRANSFORMERS | {
        node.attr
        for here, tree in sources(root)
        if here.name != config.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.search(r"config$", ast.unparse(node.value))
    }
    yield from (f"{config.name}:{line}: nothing reads `{name}`" for name, line in fields.items() if name not in read)


def errors_have_one_voice(root):
    for here, tree in sources(root):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            message = node.exc.args[0] if node.exc.args else ast.Constant("")
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            if all(isinstance(part, (ast.Constant, ast.FormattedValue)) for part in parts):
                words = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
                # A message that begins with a value passes on another error, which has the voice already.
                ours = ast.unparse(node.exc.func) == "ValueError" and not words.startswith("{}")
                if not words or (ours and not re.match(r"`[^`]+`.*(, got |: ).*\. ?.+", words, re.DOTALL)):
                    yield f'{here}:{node.lineno}: a message is "`argument` rule, got value. Remedy.", not {words!r}'


def constraints(root):
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name = line.partition("==")[0]
        if not line.startswith("#") and (not re.fullmatch(r"[\w.-]+==[\w.]+", line) or name in NEVER_IMPORTED):
            yield f"constraints.txt: {line!r} is not `name==version` of a package in the tested set"
        if name.startswith("nvidia"):
            yield f"constraints.txt: {name} would bring CUDA to a machine without a GPU"


RULES = [import_directions, ground_floor, names, no_behaviour_by_sensor, no_machine_paths, recipes]
RULES += [config_fields_are_read, errors_have_one_voice, constraints]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert list(rule(ROOT)) == []


def test_every_public_name_says_what_it_is():
    import msgfm_hf

    public = {name: getattr(msgfm_hf, name) for name in msgfm_hf.__all__}
    named = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert named and [name for name, value in named.items() if not vars(value).get("__doc__", value.__doc__)] == []


SOUND = {
    "src/msgfm_hf/model/configuration_msgfm.py": "class MsGFMConfig:\n    depth: int = 1\n",
    "src/msgfm_hf/model/modeling_msgfm.py": "import torch\nfrom .masking import draw\n\ndraw(torch.config.depth)\n",
    "src/msgfm_hf/model/masking.py": "import math\n\n\ndef draw(n):\n    return math.ceil(n)\n",
    "src/msgfm_hf/model/image_processing_msgfm.py": "try:\n    import tifffile\nexcept ImportError:\n    pass\n",
    "src/msgfm_hf/train/pretrain.py": "from ..data.batch import collate\nfrom msgfm_hf.model.masking import draw\n",
    "src/msgfm_hf/data/batch.py": 'raise ValueError(f"`n` must be above 0, got {n}. Raise it.")\n',
    "src/msgfm_hf/recipes/quickstart.yaml": "# Command: a\n# Hardware: b\n# Time: c\n# Result: not run\nseed: 0\n",
    "constraints.txt": "# tested\ntorch==2.13.0\n",
}
M, D, T = "src/msgfm_hf/model/", "src/msgfm_hf/data/", "src/msgfm_hf/train/"
FAULTS = [
    (import_directions, D + "a.py", "from ..train.pretrain import main\n", "data does not import train"),
    (import_directions, D + "a.py", "from .. import tasks\n", "data does not import tasks"),
    (import_directions, D + "a.py", "def f():\n    import msgfm_hf.cli\n", "a.py:2: .* does not import cli"),
    (import_directions, T + "a.py", "from msgfm_hf import hub\n", "train does not import hub"),
    (import_directions, "src/msgfm_hf/__init__.py", "from .train.pretrain import main\n", "does not import train"),
    (import_directions, "src/msgfm_hf/engine/a.py", "", "no room 'engine'"),
    (import_directions, T + "a.py", "from timm.layers import DropPath\n", "timm is never imported"),
    (ground_floor, M + "a.py", "import rasterio\n", "does not import rasterio"),
    (ground_floor, M + "a.py", "from PIL import Image\n", "does not import PIL"),
    (ground_floor, M + "a.py", "import tifffile\n", "does not import tifffile"),
    (ground_floor, M + "image_processing_msgfm.py", "import tifffile\n", "does not import tifffile"),
    (ground_floor, M + "a.py", "from msgfm_hf.model.masking import draw\n", "does not import msgfm_hf"),
    (ground_floor, M + "a.py", "from . import masking\n", "only `from .module import Name`"),
    (ground_floor, M + "a.py", "from ..data.batch import collate\n", "only `from .module import Name`"),
    (ground_floor, M + "a.py", '"""Use:\n\n    from .ghost import x\n"""\n', "looks like a relative import of 'ghost'"),
    (ground_floor, M + "a.py", "from .ghost import x\n", "no file for 'ghost'"),
    (ground_floor, M + "layers/a.py", "", "model/ is flat"),
    (names, D + "utils.py", "", "utils.py: the name says nothing"),
    (names, "modeling_tests/helpers/a.py", "", "the name says nothing"),
    (no_behaviour_by_sensor, T + "a.py", "if sensor == 's1':\n    pass\n", r"by sensor \['s1'\]"),
    (no_behaviour_by_sensor, T + "a.py", "x = 1 if name in ('rgb', 'other') else 2\n", r"by sensor \['rgb'\]"),
    (no_behaviour_by_sensor, T + "a.py", "match s:\n    case 'dsm':\n        pass\n", r"by sensor \['dsm'\]"),
    (no_machine_paths, "README.md", "Data are in /" + "home/me/data.\n", "README.md:1: a path of one machine"),
    (no_machine_paths, "CONTRIBUTING.md", "See file:///" + "opt/data.\n", "CONTRIBUTING.md:1: a path of one machine"),
    (no_machine_paths, T + "a.py", "x = '/" + "work/x'\n", "a.py:1: a path of one machine"),
    (recipes, "src/msgfm_hf/recipes/a.yaml", "# Command: a\n# Time: c\n# Result: d\nseed: 0\n", "say `hardware:`"),
    (recipes, "src/msgfm_hf/recipes/a.yaml", "seed: 0\n# Command: late\n", "say `command:`"),
    (config_fields_are_read, M + "configuration_msgfm.py", "class C:\n    dead: int = 1\n", "nothing reads `dead`"),
    (errors_have_one_voice, D + "a.py", "raise ValueError('Bad n')\n", "not 'Bad n'"),
    (errors_have_one_voice, D + "a.py", "raise RuntimeError()\n", "not ''"),
    (constraints, "constraints.txt", "torch==2.13.0+cpu\n", "is not `name==version`"),
    (constraints, "constraints.txt", "nvidia-nccl==2.0\n", "nvidia-nccl would bring CUDA"),
    (constraints, "constraints.txt", "timm==1.0\n", "'timm==1.0' is not"),
]


def build(root, tree):
    for path, text in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


def test_a_sound_tree_has_no_fault(tmp_path):
    build(tmp_path, SOUND)
    assert [fault for rule in RULES for fault in rule(tmp_path)] == []


@pytest.mark.parametrize(("rule", "path", "text", "said"), FAULTS)
def test_a_planted_fault_is_found(rule, path, text, said, tmp_path):
    build(tmp_path, {**SOUND, path: text})
    found = list(rule(tmp_path))
    assert len(found) >= 1 and re.search(said, "\n".join(found))
