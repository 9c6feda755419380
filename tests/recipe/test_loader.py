"""Recipe loader: precedence, `--set`, error messages."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe import dump_recipe, load_recipe, parse_recipe

RECIPE = """\
mixer: {conv_width: 3}
data: {max_length: 64}
stages:
  - &stage
    {name: one, learns: new, loss: mixer-mse, inputs: teacher, steps: 2, batch_size: 4, lr: 1e-3,
     schedule: {warmup: 0.5}}
  - {<<: *stage, name: two, learns: ["*.A_log"], optimiser: {betas: [0.8, 0.9]}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def lines(text: str, sets: tuple[str, ...] = (), **overrides: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "f.yaml", sets, overrides)
    return str(caught.value).splitlines()


def test_command_line_over_set_over_recipe_over_defaults(recipe_file: Path) -> None:
    sets = ["data.max_length=128", "mixer.conv_width=4", "mixer.conv_width=5"]
    recipe = load_recipe(recipe_file, sets, {"data.max_length": 256})
    assert recipe.data.max_length == 256  # command line
    assert recipe.mixer.conv_width == 5  # the last --set
    assert recipe.stages[0].schedule.warmup == 0.5  # recipe
    assert recipe.stages[0].schedule.decay == 0.1  # default
    assert load_recipe(recipe_file).data.max_length == 64


@pytest.mark.parametrize(
    "field", ["stages[1].lr", "stages.two.lr", "stages.1.lr", " stages[1].lr "]
)
def test_a_stage_is_addressed_by_index_or_name(recipe_file: Path, field: str) -> None:
    recipe = load_recipe(recipe_file, [f"{field}=1e-5"])
    assert [stage.lr for stage in recipe.stages] == [1e-3, 1e-5]


def test_set_creates_fields_that_the_recipe_leaves_out(recipe_file: Path) -> None:
    sets = ["layers.attention=[4, 0]", "stages.one.optimiser.clip=null", "stages[1].steps=7"]
    sets += ["stages.two.optimiser.betas[1]=0.95", "teacher=folder/a=b", "description="]
    recipe = load_recipe(recipe_file, [*sets, 'description="1e5"'])
    assert recipe.layers.attention == (0, 4)
    assert recipe.stages[0].optimiser.clip is None
    assert recipe.stages[1].steps == 7
    assert recipe.stages[1].optimiser.betas == (0.8, 0.95)
    assert recipe.teacher == "folder/a=b"
    assert recipe.description == "1e5"


def test_setting_a_section_shared_by_an_anchor_changes_one_stage(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["stages.two.schedule.warmup=0.25"])
    assert [stage.schedule.warmup for stage in recipe.stages] == [0.5, 0.25]


def test_overrides_may_hold_what_yaml_cannot() -> None:
    recipe = parse_recipe(RECIPE, "f", overrides={"layers.attention": (4, 0), "teacher": "1e5"})
    assert recipe.layers.attention == (0, 4)
    assert recipe.teacher == "1e5"


def test_a_resolved_recipe_loads_back_equal(recipe_file: Path) -> None:
    sets = ["layers.attention=[4, 0]", "teacher='no'", "stages.one.loss=kl"]
    recipe = load_recipe(recipe_file, [*sets, "stages.one.inputs=student", "stages.one.lora={}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = dump_recipe(recipe)
    assert parse_recipe(text, "dump") == recipe
    for default in ("placement: head-interleaved", "temperature: 1.0", "rank: 16", "weight_decay"):
        assert default in text


def test_every_problem_has_its_line() -> None:
    text = """\
teacher: 3
layers: {attention: [0, 4, 0], placment: head-interleaved}
mixer: {init: inherit-mimic}
data: {max_length: 8k}
stages:
  - {name: a, learns: new, loss: mixer-mse, inputs: teacher, steps: 0, batch_size: 2.5}
  - {name: b, learns: new, loss: kl, inputs: student, steps: 1, batch_size: 1, lr: '1e-3',
     optimiser: {betas: [0.9, 1.0], clip: 0}}
  - 3
"""
    *found, last = lines(text)
    assert found == [
        "f.yaml: teacher: is 3, must be some text or null",
        "f.yaml: layers.attention[2]: is 0, which stands at [0] already; name a layer once",
        "f.yaml: layers.placment: unknown key, allowed are attention, placement, select, mixers; "
        "did you mean placement?",
        "f.yaml: mixer.init: is 'inherit-mimic', must be one of scratch, inherit, inherit+mimic, "
        "calibrated; did you mean inherit+mimic?",
        "f.yaml: data.max_length: is '8k', must be a whole number at least 2 and at most 1048576",
        "f.yaml: stages[0].steps: is 0, must be a whole number at least 1 and at most 1000000000",
        "f.yaml: stages[0].batch_size: is 2.5, must be a whole number at least 1 and at most "
        "1048576",
        "f.yaml: stages[0].lr: is missing, must be a number above 0 and at most 1",
        "f.yaml: stages[1].lr: is '1e-3', must be a number above 0 and at most 1",
        "f.yaml: stages[1].optimiser.betas[1]: is 1.0, must be a number at least 0 and below 1",
        "f.yaml: stages[1].optimiser.clip: is 0, must be a number above 0 or null",
    ]
    assert last.startswith("f.yaml: stages[2]: is 3, must be a section with the keys name, learns,")


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("stages.two.lr=-1e-5", "--set: stages[1].lr: is -1e-05, must be a number above 0"),
        ("mixer.ropee=true", "--set: mixer.ropee: unknown key, allowed are kind, init, conv_width"),
        ("mixer.rope=yes", "--set: mixer.rope: is 'yes', must be true or false"),
        ("stages=[]", "--set: stages: is [], must be a list, not empty, each a section"),
        ("stages.three.lr=1", "--set: stages.three: names no entry, must be one or two"),
        ("stages[2].lr=1", "--set: stages[2]: there are 2 entries, must be [0] one or [1] two"),
        ("stages[0].kl.mask=all", "--set: stages[0].kl: is given, must be null or left out"),
        ("data.max_length.x=1", "--set: data.max_length: is 64, must be a section to set x"),
        ("data.max_length[0]=1", "--set: data.max_length: is 64, must be a list to set [0]"),
        ("data[0]=1", "--set: data: is a section, [0] is no key of it"),
        (
            "stages[0].optimiser.betas[0]=1",
            "--set: stages[0].optimiser.betas: has no entries in the recipe, must be set as a "
            "whole list",
        ),
        ("lr", "--set: is 'lr', must be section.field=value, such as data.max_length=4096"),
        ("=3", "--set: '' is no field, must be like data.max_length or stages[2].lr"),
        ("a..b=3", "--set: 'a..b' is no field, must be like"),
        ("data.train=[", "--set data.train: not valid YAML: "),
    ],
)
def test_problems_of_a_set_name_the_set(assignment: str, line: str) -> None:
    (found,) = lines(RECIPE, (assignment,))
    assert found.startswith(line)


def test_a_problem_names_the_source_of_the_value() -> None:
    text = RECIPE.replace("conv_width: 3", "conv_width: 0")
    sets = ("data.max_length=0", "data.workers=-1")
    found = lines(text, sets, **{"data.max_length": 1})
    assert [line[: line.index(": is")] for line in found] == [
        "f.yaml: mixer.conv_width",
        "command line: data.max_length",
        "--set: data.workers",
    ]


def test_no_foreign_words_or_addresses() -> None:
    text = RECIPE.replace("{conv_width: 3}", "{conv_width: {}, rope: 3, d_skip: null, x: 1}")
    found = "\n".join(lines(text + "teacher: [1]\nseed: .5\ndata: 3\n".replace("data", "layers")))
    for word in ("pydantic", "http", "Input should", "Extra inputs", "valid dict", "type="):
        assert word not in found
    assert found.count("\n") == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "f.yaml: is empty, must be a section"), ("- 1\n", "f.yaml: is [1], must be a section")],
)
def test_a_recipe_that_is_not_a_section(text: str, message: str) -> None:
    assert lines(text)[0].startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path, recipe_file: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"teacher: \xff\n")
    for path, message in (
        (tmp_path / "none.yaml", "none.yaml: no such file"),
        (recipe_file / "none.yaml", "none.yaml: no such file"),
        (tmp_path, ": is a folder, must be a YAML file"),
        (tmp_path / "bytes.yaml", "bytes.yaml: not text in UTF-8 (byte 9)"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value).endswith(message)


def test_a_name_is_a_shipped_recipe_and_a_path_a_file(
    tmp_path: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe_file.with_name("smoke").write_text(RECIPE)
    recipe_file.with_name("other").write_text(RECIPE)
    assert load_recipe("mine.yaml") == load_recipe(recipe_file)
    assert load_recipe("other") == load_recipe(recipe_file)
    assert load_recipe("smoke").stages[0].name == "stage1"
    assert load_recipe("./smoke") == load_recipe(recipe_file)
    assert load_recipe(Path("smoke")) == load_recipe(recipe_file)
    with pytest.raises(RecipeError, match=r"no recipe is called smok: .*did you mean smoke\?"):
        load_recipe("smok")
