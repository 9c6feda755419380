"""Plans: what is refused, and the cells and shared stages that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ablation_plans import WritePlan

from mmmamba_cli.ablation import expand, load_plan
from mmmamba_cli.ablation.cells import check_keep, find_shared_stages, select
from mmmamba_cli.architecture import parameter_shapes
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.distill.student_layers import holistic_layers
from mmmamba_cli.distill.trainable import lora_weight_names, select_trainable
from mmmamba_cli.errors import RecipeError

ROOT = Path(__file__).parents[2]


def refusal(file: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        expand(load_plan(file))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sets": {}}, ["sets: unknown key, allowed are name", "did you mean set?"]),
        (
            {"arms": [{"name": "linear", "sat": {}}]},
            ["arms[0].sat: unknown key", "did you mean set?"],
        ),
        ({"base": "lineer"}, ["base: is lineer", "which is no arm", "did you mean linear?"]),
        (
            {"arms": [{"name": "linear", "parent": "base"}]},
            ["arms[0].parent: is base", "no arm above it", "there is none"],
        ),
        (
            {"arms": [{"name": "linear"}, {"name": "linear"}]},
            ["arms[1].name: is linear, which is the name of arms[0] already"],
        ),
        ({"arms": [{"name": "li/near"}]}, ["arms[0].name: is 'li/near', must be a name"]),
        ({"seeds": [0, 0]}, ["seeds[1]: is 0", "given once"]),
        ({"suites": [{"name": "mme", "limit": 0}]}, ["suites[0].limit: is 0", "at least 1"]),
        ({"tables": [{"name": "t", "arms": ["hybird"]}]}, ["tables[0].arms[0]: is hybird"]),
        (
            {"tables": [{"name": "t", "arms": ["linear"], "suites": ["mme"]}]},
            ["tables[0].suites[0]: is mme, which is no suite"],
        ),
        ({"estimates": {"step": {"stage1": 0}}}, ["estimates.step.stage1: is 0"]),
        (
            {"arms": [{"name": "linear", "set": {"stages.stage3.step": 1}}]},
            ["arm linear:", "stages[2].step: unknown key", "did you mean steps?"],
        ),
        (
            {"arms": [{"name": "linear", "stages": ["stage1", "stage9"]}]},
            ["arm linear: stages: is stage9", "stage1, stage2 or stage3"],
        ),
        (
            {"arms": [{"name": "linear", "stages": ["stage2", "stage1"]}]},
            ["arm linear: stages: are stage2, stage1, must be in the recipe's order"],
        ),
        (
            {"arms": [{"name": "linear", "set": {"layers.attention": 1}, "stages": ["stage1"]}]},
            ["arm linear: layers.attention is set, and none of its stages", "add stage3"],
        ),
    ],
)
def test_what_is_wrong_is_named(
    changes: dict[str, Any], words: list[str], write_plan: WritePlan
) -> None:
    text = refusal(write_plan(changes))
    for word in words:
        assert word in text


def test_an_arm_begins_with_its_parents_changes(write_plan: WritePlan) -> None:
    arms = [
        {"name": "linear", "stages": ["stage1", "stage3"]},
        {"name": "child", "parent": "linear", "set": {"stages.stage3.steps": 7}},
        {"name": "grandchild", "parent": "child", "set": {"stages.stage1.steps": 5}},
    ]
    cells = {one.arm: one for one in expand(load_plan(write_plan({"arms": arms})))}
    assert list(cells) == ["teacher", "linear", "child", "grandchild"]
    recipe = cells["grandchild"].recipe
    assert recipe is not None
    assert [(stage.name, stage.steps) for stage in recipe.stages] == [("stage1", 5), ("stage3", 7)]


def test_stages_that_arms_have_in_common_are_shared(write_plan: WritePlan) -> None:
    arms = [
        {"name": "linear"},
        {"name": "hybrid", "set": {"layers.attention": 1}},
        {"name": "early", "stages": ["stage1", "stage2"]},
        {"name": "first", "stages": ["stage1"]},
        {"name": "other", "set": {"stages.stage1.lr": 0.01}},
        {"name": "workers", "set": {"data.workers": 3}},
    ]
    cells = expand(load_plan(write_plan({"arms": arms, "seeds": [0, 1]})))
    paths = find_shared_stages(cells)
    stages = {name: [shared.stages for shared in path] for name, path in paths.items()}
    one, two, three = ("stage1",), ("stage1", "stage2"), ("stage1", "stage2", "stage3")
    for seed in (0, 1):
        # `workers` changes no weights, so that it shares stage 3 with `linear`.
        assert stages[f"linear-seed{seed}"] == [one, two, three]
        assert stages[f"workers-seed{seed}"] == [one, two, three]
        assert stages[f"hybrid-seed{seed}"] == [one, two]
        assert stages[f"early-seed{seed}"] == [one, two]
        assert stages[f"first-seed{seed}"] == [one]
        assert stages[f"other-seed{seed}"] == []
    assert paths["linear-seed0"][0].digest != paths["linear-seed1"][0].digest


def test_patterns(write_plan: WritePlan) -> None:
    cells = expand(load_plan(write_plan({"seeds": [0, 1]})))
    names = [cell.name for cell in select(cells, "hy*,*r-seed1,teacher,l*-seed1")]
    assert names == ["teacher", "hybrid-seed0", "linear-seed1", "hybrid-seed1"]
    with pytest.raises(RecipeError, match=r"'hybird' matches no cell; did you mean hybrid\?"):
        select(cells, "linear,hybird")


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/plans/*.yaml")), ids=lambda f: f.stem)
def test_shipped_plans(file: Path) -> None:
    plan = load_plan(file)
    cells = expand(plan)
    assert len(cells) == 1 + len(plan.arms) * len(plan.seeds)
    listed = {arm for table in plan.tables for arm in table.arms}
    assert {arm.name for arm in plan.arms} <= listed


def test_the_plan_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/ablations.md").read_text(encoding="utf-8")
    text = page.partition("```yaml\n")[2].partition("```")[0]
    file = tmp_path / "my-plan.yaml"
    file.write_text(text, encoding="utf-8")
    cells = expand(load_plan(file))
    assert len(cells) == 13


@pytest.mark.parametrize(
    ("arm", "adapters"), [("student-lora", 3 * 8), ("student-bf16-lora-all", 6 * 8)]
)
def test_adapters_of_the_plan_stability_are_all_that_learns(arm: str, adapters: int) -> None:
    cells = expand(load_plan(ROOT / "benchmarks/plans/stability.yaml"))
    cell = next(cell for cell in cells if cell.arm == arm)
    assert cell.recipe is not None
    stage = cell.recipe.stages[-1]
    architecture = open_checkpoint("scenes-linear").architecture
    names = list(parameter_shapes(architecture))
    learned = select_trainable(stage, holistic_layers(architecture), names)  # type: ignore[arg-type]
    assert sorted(lora_weight_names(stage, learned, names)) == learned
    assert len(learned) == adapters


@pytest.mark.parametrize("field", ["seed=3", "teacher=other"])
def test_fields_of_the_plan_cannot_be_set(field: str, write_plan: WritePlan) -> None:
    with pytest.raises(RecipeError, match=f"--set {field}: {field[:4]}.* is the plan's"):
        expand(load_plan(write_plan({})), [field])


def test_products_to_keep_must_exist(write_plan: WritePlan) -> None:
    cells = expand(load_plan(write_plan({})))
    good = [
        "evaluated",
        "all",
        "none",
        "seed",
        "stage1",
        "hybrid-1",
        "linear-stage3",
        "stage2-best",
    ]
    check_keep(good, cells)
    with pytest.raises(RecipeError, match=r"called evalutated.*did you mean evaluated"):
        check_keep(["evalutated"], cells)
    named = {"arms": [{"name": "linear", "commands": ["hybridize --run {run} --name mine"]}]}
    check_keep(["mine"], expand(load_plan(write_plan(named))))
