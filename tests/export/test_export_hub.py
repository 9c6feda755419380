"""The `hub` format, loaded with transformers in a process without this package."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_students import into_hub_cache
from isolated_process import run_isolated
from mmmamba_hf_case import write_released
from PIL import Image
from safetensors.torch import load_file
from small_language_models import write, write_tokenizer
from test_as_a_new_user import write_teacher
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.architecture import LINEAR, mixer_specs
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.export.remote_code import bundle_files
from mmmamba_cli.runs import Run, open_processor

# Prints a model's answers and saves its logits, for text and for text with a picture.
ASK = """
def ask(model, processor, picture, out):
    import json, torch
    from safetensors.torch import save_file
    torch.set_num_threads(1)
    kept, said = {}, []
    questions = [("Hello there", [])]
    if picture is not None:
        questions.append(("<image>\\nWhat is this?", [picture]))
    for index, (question, pictures) in enumerate(questions):
        batch = processor.chat(question, pictures)
        with torch.no_grad():
            kept[f"logits.{index}"] = model(**batch).logits
            tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
        kept[f"tokens.{index}"] = tokens
        said.append(processor.tokenizer.decode(tokens[0], skip_special_tokens=True))
    save_file(kept, out)
    print(json.dumps(said))
"""
THERE = (
    ASK
    + """
from transformers import AutoProcessor, {auto}
name, picture, out = sys.argv[1:]
model = {auto}.from_pretrained(name, trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
assert type(processor).__module__.startswith("transformers_modules.")
assert not any(key.startswith("mmmamba_cli") for key in sys.modules)
ask(model.eval(), processor, picture or None, out)
"""
)
PICTURES, WORDS = "AutoModelForImageTextToText", "AutoModelForCausalLM"


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((90, 60)).save(file)
    return file


def hub_of(source: Path, work: Path, *seeding: str) -> tuple[Path, Path]:
    """A hybrid product in fp32 and its export."""
    run = work / "run"
    mmmamba("seed", source, "--run", run, "--dtype", "fp32", "--no-report", *seeding)
    mmmamba("hybridize", "--attn-layers", "2", "--run", run)
    mmmamba("export", "--run", run, "--format", "hub", "--out", work / "hub")
    return run / "products/hybrid-2", work / "hub"


def assert_same_answers(
    product: Path, name: Path | str, picture: Path | None, work: Path, auto: str
) -> None:
    """Assert that `name` gives the product's answers and logits in an isolated process."""
    there = work / "there.safetensors"
    said = run_isolated(THERE.replace("{auto}", auto), name, picture or "", there)
    checkpoint = open_checkpoint(product)
    here = work / "here.safetensors"
    scope: dict[str, Any] = {"print": lambda text: said_here.append(text)}
    said_here: list[str] = []
    exec(ASK, scope)
    scope["ask"](mmmamba_cli.load(str(product)), open_processor(checkpoint), picture, here)
    one, two = load_file(here), load_file(there)
    assert set(one) == set(two) and len(one) == (2 if picture is None else 4)
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key
    assert json.loads(said.strip().splitlines()[-1]) == json.loads(said_here[0])


@pytest.mark.parametrize("shuffle", ["pre", "post"])
def test_hybrid_in_an_isolated_process(tmp_path: Path, picture: Path, shuffle: str) -> None:
    folder = write_teacher(tmp_path / "teacher")
    raw = json.loads((folder / "config.json").read_text())
    raw["embedding_config"]["pixel_shuffle_loc"] = shuffle
    (folder / "config.json").write_text(json.dumps(raw))
    sets = ["--set", "mixer.d_skip=true"]
    if shuffle == "post":
        # Attention goes to the first layer of each stack; every mixer is in another one.
        kinds = [name for name, spec in mixer_specs().items() if spec.layer_type == LINEAR]
        others = ", ".join(f"{name}: [{place + 1}]" for place, name in enumerate(kinds))
        sets += ["--set", f"layers.mixers={{{others}}}"]
        sets += ["--set", "mixer.tile_taps=true", "--set", "mixer.tile_layers=all"]
    product, hub = hub_of(folder / "hovle.ckpt", tmp_path, *sets)
    names = mmmamba_cli.load(str(product)).config.mixer_names
    assert len(set(names)) == (len(kinds) + 1 if shuffle == "post" else 2)
    assert_same_answers(product, hub, picture, tmp_path, PICTURES)


def test_hub_cache_by_name(tmp_path: Path, picture: Path) -> None:
    """From the Hub's cache transformers loads the code file by file."""
    folder = write_teacher(tmp_path / "teacher")
    product, hub = hub_of(folder / "hovle.ckpt", tmp_path)
    name = into_hub_cache(hub, "someone/my.model-1")
    assert_same_answers(product, name, picture, tmp_path, PICTURES)


@pytest.mark.parametrize("tokenizer", ["fast", "internlm2"])
def test_language_model_in_an_isolated_process(tmp_path: Path, tokenizer: str) -> None:
    teacher = tmp_path / "teacher"
    if tokenizer == "fast":
        write(teacher, "Qwen3", {"head_dim": 16})
        write_tokenizer(teacher)
    else:
        write_internlm2(teacher)
    product, hub = hub_of(teacher, tmp_path)
    assert_same_answers(product, hub, None, tmp_path, WORDS)


def write_internlm2(folder: Path) -> None:
    """Write a random InternLM2 with the tests' SentencePiece tokenizer."""
    from safetensors.torch import save_file
    from small_checkpoint import SMALL_MODEL

    from mmmamba_cli.checkpoint import llama_family

    folder.mkdir()
    raw = {
        "model_type": "internlm2",
        "vocab_size": 535,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bias": False,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    rng = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=rng) / 6
        for mapping in llama_family.name_map(raw, llama_family.to_config(raw))
        for name, shape in mapping.foreign.items()
    }
    save_file(state, folder / "model.safetensors")
    shutil.copy(SMALL_MODEL, folder / "tokenizer.model")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


@torch.no_grad()
def test_golden_logits_in_an_isolated_process(golden_case: Path, tmp_path: Path) -> None:
    """A hub export of a published model without a tokenizer gives the golden logits."""
    folder = write_released(tmp_path / "in", golden_case, "hybrid")
    mmmamba("export", "--model", folder, "--format", "hub", "--out", tmp_path / "hub")
    program = """
import torch
from transformers import AutoModel, AutoModelForImageTextToText
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
golden = load_file(sys.argv[2])
inputs = golden["input.input_ids"], golden["input.pixel_values"]
with torch.no_grad():
    logits = model.eval()(*inputs).logits
    assert torch.equal(model.lm_head(base.eval()(*inputs).last_hidden_state), logits)
save_file({"logits": logits}, sys.argv[3])
"""
    out, golden_file = tmp_path / "out.safetensors", golden_case / "golden.safetensors"
    run_isolated(program, tmp_path / "hub", golden_file, out)
    logits, golden = load_file(out)["logits"], load_file(golden_file)
    expected = golden["stage3.hybrid.logits"]
    assert (logits - expected).norm() <= 1e-4 * expected.norm()
    torch.set_num_threads(1)
    model = mmmamba_cli.load(str(folder))
    assert torch.equal(
        logits, model(golden["input.input_ids"], golden["input.pixel_values"]).logits
    )


def test_a_hub_export_is_a_native_checkpoint(tmp_path: Path) -> None:
    """mmmamba loads the export with its own code; products made from it reference no code."""
    folder = write_teacher(tmp_path / "teacher")
    product, hub = hub_of(folder / "hovle.ckpt", tmp_path)
    assert open_checkpoint(hub).source.content_hash() == (
        open_checkpoint(product).source.content_hash()
    )
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert type(AutoProcessor.from_pretrained(hub)).__module__.startswith("mmmamba_cli.")
    model = AutoModelForImageTextToText.from_pretrained(hub)
    assert type(model).__module__.startswith("mmmamba_cli.")
    mmmamba("import", hub, "--run", tmp_path / "again")
    manifest = Run(tmp_path / "again").product("imported")
    assert not manifest.final and manifest.attention_layers == (0, 4)
    for file in (tmp_path / "again/products/imported").glob("*.json"):
        assert "auto_map" not in file.read_text(), file
    assert not list((tmp_path / "again/products/imported").glob("*.py"))


def test_bundled_files_and_their_imports() -> None:
    files = bundle_files()
    asked = set()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                wanted = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(f"{module}.py" in files for module in wanted), (name, wanted)
            elif isinstance(node, ast.ImportFrom):
                asked.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Import):
                asked |= {alias.name.partition(".")[0] for alias in node.names}
    allowed = {"torch", "transformers", "numpy", "PIL", "sentencepiece", "jinja2"}
    assert asked - sys.stdlib_module_names <= allowed
    assert set(files) >= {
        "configuration_mmmamba.py",
        "modeling_mmmamba.py",
        "processing_mmmamba.py",
        "mmmamba_ops.py",
    }
    assert len(files) < 10


MERGED = {
    "errors.py": "class Problem(Exception): ...\n",
    "ops/__init__.py": "from mmmamba_cli.ops.one import step\n\n__all__ = ['step']\n",
    "ops/one.py": '''"""One."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.errors import Problem
from mmmamba_cli.ops import other

if TYPE_CHECKING:
    from mmmamba_cli.ops.other import Kind

LIMIT = 2


def step(x: Kind, LIMIT: int = LIMIT) -> int:
    """Parameters and locals hide the module's names."""
    _check = [LIMIT for LIMIT in range(LIMIT)]
    if len(_check) > 9:
        raise Problem(f"{x} of {LIMIT}")
    return other.step(x) + LIMIT + len(_check) + other.LIMIT


def _check(x: int) -> int:
    from mmmamba_cli.ops.other import _check as theirs

    class Held:
        LIMIT = 5
        total = LIMIT + x

        def get(self) -> int:
            return self.total + LIMIT

    return theirs(x, step=1) + Held().get()
''',
    "ops/other.py": """
LIMIT = 40


class Kind(int): ...


def step(x: int) -> int:
    return x * LIMIT


def _check(x: int, step: int = 0) -> int:
    return x + step
""",
    "model/__init__.py": "",
    "model/config.py": "import json\n\nconfig = json\n",
    "model/modeling.py": """
from mmmamba_cli.model.config import config
from mmmamba_cli.ops import step
from mmmamba_cli.ops.one import LIMIT, _check


def run() -> tuple[int, ...]:
    return step(3), _check(4), LIMIT, len(config.dumps(1))
""",
}
RUN = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
print(importlib.import_module(sys.argv[2]).run())
"""


def test_merged_modules_compute_the_same(tmp_path: Path) -> None:
    """Modules with shared, shadowed, aliased and late-imported names in one file."""
    package = tmp_path / "source/mmmamba_cli"
    for name, text in MERGED.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (package / "__init__.py").write_text("__version__ = '0'\n")
    for folder in ("export", "lazy_imports.py", "plugins.py"):
        assert not (package / folder).exists()
    write = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mmmamba_cli
mmmamba_cli.__path__.append(sys.argv[2])
import types
export = types.ModuleType("mmmamba_cli.export")
export.__path__ = [sys.argv[2] + "/export"]
sys.modules["mmmamba_cli.export"] = export
from mmmamba_cli.export.remote_code import bundle_files
out = Path(sys.argv[3])
out.mkdir()
(out / "__init__.py").touch()
for name, text in bundle_files(["mmmamba_cli.model.modeling"]).items():
    (out / name).write_text(text)
    print(name)
"""
    ours = Path(mmmamba_cli.__file__).parent
    words = [str(package.parent), str(ours), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", write, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
    found = [
        subprocess.run(
            [sys.executable, "-c", RUN, str(place), module], capture_output=True, text=True
        )
        for place, module in (
            (package.parent, "mmmamba_cli.model.modeling"),
            (tmp_path, "out.modeling_mmmamba"),
        )
    ]
    assert found[0].returncode == 0, found[0].stderr
    assert found[1].stdout == found[0].stdout == "(164, 16, 2, 1)\n", found[1].stderr


@pytest.mark.parametrize("line", ["import triton", "    from einops import rearrange"])
def test_disallowed_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Imports anywhere: transformers checks those in functions too."""
    (tmp_path / "odd_module.py").write_text(f"def run():\n    pass\n{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"odd_module imports .*, which exported code may not"):
        bundle_files(["odd_module"])
