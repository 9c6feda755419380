"""The model card of a student of another teacher; lineage, scores and recipe as in `model_card`."""

from __future__ import annotations

from typing import Any

from mmmamba_cli.architecture import mixer_spec
from mmmamba_cli.checkpoint import InPlaceCheckpoint
from mmmamba_cli.checkpoint.in_place_loader import needs_processor
from mmmamba_cli.export.model_card import (
    CardInfo,
    card_title,
    describe_layers,
    distillation_note,
    front_matter,
    run_sections,
)
from mmmamba_cli.export.student_code import STUDENT_FILE
from mmmamba_cli.export.teacher_licence import TeacherLicence
from mmmamba_cli.runs.provenance import Provenance
from mmmamba_cli.teachers import bidirectional_warning
from mmmamba_cli.teachers.auto_class import auto_classes, register_model


def student_card_text(
    checkpoint: InPlaceCheckpoint,
    dtype: str,
    parameters: int,
    card: CardInfo,
    licence: TeacherLicence,
) -> str:
    """The text of README.md of a student's export; `licence` is the teacher's."""
    assert checkpoint.plan is not None
    plan, total = checkpoint.plan, checkpoint.num_layers
    linear = [mixer_spec(plan.mixers[layer]).title for layer in plan.linear_layers]
    layers = describe_layers(checkpoint.attention_layers, total, linear)
    title = card_title(checkpoint.path, card)
    config_class: Any = type(checkpoint.config)
    family = register_model(config_class).__bases__[0].__name__
    lines = [
        *front_matter(_task(checkpoint), title, card, licence),
        f"# {title}",
        "",
        f"{layers}. {parameters / 1e6:,.1f} M parameters in {dtype}.",
        *(distillation_note(card.manifest or Provenance()) if linear else []),
        "",
        "## Conversion",
        "",
        f"The teacher is a {family} of transformers. mmmamba replaced the attention of "
        f"{len(linear)} of the {total} layers of its text decoder. Everything else is the "
        "teacher's architecture, and the processor is the teacher's.",
        *_warning(checkpoint),
        "",
        *_licence_section(licence),
        *_usage_section(checkpoint),
        *run_sections(card),
    ]
    return "\n".join(lines) + "\n"


def _task(checkpoint: InPlaceCheckpoint) -> str:
    return "image-text-to-text" if needs_processor(checkpoint) else "text-generation"


def _warning(checkpoint: InPlaceCheckpoint) -> list[str]:
    found = bidirectional_warning(checkpoint.config)
    if found is None or not checkpoint.plan or not checkpoint.plan.linear_layers:
        return []
    return ["", f"{found[0].upper()}{found[1:]}."]


def _licence_section(licence: TeacherLicence) -> list[str]:
    files = ", ".join(f"`{file.name}`" for file in licence.files)
    if licence.identifier is not None:
        known = licence.identifier if licence.name is None else licence.name
        text = f"The teacher's license is {known}."
    elif files:
        text = "The teacher's license is in the files below."
    else:
        text = "The teacher's license is not known here; it applies to these weights too."
    files = f" Its files: {files}." if files else ""
    return ["## License", "", f"{text}{files}", ""]


def _usage_section(checkpoint: InPlaceCheckpoint) -> list[str]:
    code = _picture_code if needs_processor(checkpoint) else _text_code
    auto = auto_classes(type(checkpoint.config))[0].__name__
    return [
        "## Use",
        "",
        "```python",
        *code(auto),
        "```",
        "",
        "`trust_remote_code=True` is needed: the classes of the model and its config are in this "
        f"folder, in `{STUDENT_FILE}.py` and the files that it imports. With mmmamba installed, "
        "`import mmmamba_cli.model` takes its place, and none of these files is run.",
        "",
    ]


def _picture_code(auto: str) -> list[str]:
    return [
        f"from transformers import {auto}, AutoProcessor",
        "",
        'folder = "this folder, or its name on the Hub"',
        f'model = {auto}.from_pretrained(folder, dtype="auto", trust_remote_code=True)',
        "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
        'picture = {"type": "image", "path": "picture.jpg"}',
        'question = {"type": "text", "text": "What is shown?"}',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": [picture, question]}],',
        "    add_generation_prompt=True,",
        "    tokenize=True,",
        "    return_dict=True,",
        '    return_tensors="pt",',
        ")",
        "tokens = model.generate(**inputs, max_new_tokens=100)",
        'answer = tokens[0, inputs["input_ids"].shape[1]:]',
        "print(processor.decode(answer, skip_special_tokens=True))",
    ]


def _text_code(auto: str) -> list[str]:
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder = "this folder, or its name on the Hub"',
        f'model = {auto}.from_pretrained(folder, dtype="auto", trust_remote_code=True)',
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "inputs = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": "Who are you?"}],',
        "    add_generation_prompt=True,",
        "    return_dict=True,",
        '    return_tensors="pt",',
        ")",
        "tokens = model.generate(**inputs, max_new_tokens=100)",
        'answer = tokens[0, inputs["input_ids"].shape[1]:]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
