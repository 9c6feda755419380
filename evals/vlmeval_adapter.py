"""Adapter to VLMEvalKit: its data sets and scores with `--with vlmeval`.

The model is a subclass of `vlmeval.vlm.base.BaseModel` with `build_prompt` and
`generate_inner(message, dataset)`, registered in `vlmeval.config.supported_VLM`; a message is a
list of `{"type": "text" | "image", "value": ...}`. VLMEvalKit is installed from source, see
docs/evaluation.md.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import yaml

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate import EvalModel, EvalOptions, EvalPrompt, find_suite, suite_names
from mmmamba_cli.evaluate.answer_cache import settings_key
from mmmamba_cli.evaluate.fingerprint import code_digest, file_digest, library_versions
from mmmamba_cli.evaluate.images import Picture
from mmmamba_cli.evaluate.prompts import question_text, tiles_per_picture
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.suite import PromptStyle

MAX_TILES, MAX_NEW_TOKENS = 6, 1024
PROMPTS = Path(__file__).with_name("vlmeval_prompts.yaml")
ENVIRONMENT = "LMUData"
INSTALL = (
    "pip install 'vlmeval @ git+https://github.com/open-compass/VLMEvalKit'; it is not on PyPI"
)
# Suffixes of VLMEvalKit's answer files.
ENDINGS = (".xlsx", ".tsv", ".json")


@dataclass(frozen=True)
class DatasetStyle:
    """The prompt style and tiling of a data set."""

    prompt: PromptStyle
    max_tiles: int = MAX_TILES
    enlarge: int = 1


def style_of(dataset: str, kind: str | None = None) -> DatasetStyle | None:
    """The style of the published evaluations; None for VLMEvalKit's own prompt.

    `kind` is VLMEvalKit's type of the data set; all multiple-choice ones have one style.
    """
    for name in suite_names():
        suite = find_suite(name)
        if suite.dataset == dataset:
            return DatasetStyle(suite.prompt, suite.max_tiles, suite.enlarge)
    for entry in _entries():
        if entry["contains"] in dataset:
            prompt = PromptStyle(
                style=entry.get("style", "question"), append=entry.get("append", "")
            )
            return DatasetStyle(prompt, entry.get("max_tiles", MAX_TILES), entry.get("enlarge", 1))
    return DatasetStyle(PromptStyle(style="choices")) if kind == "MCQ" else None


@cache
def _entries() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    return found


def row_of(line: Mapping[str, Any]) -> Row:
    """A row from a line of VLMEvalKit's table, where missing cells are NaN."""
    there = {str(key): value for key, value in dict(line).items() if _is_there(value)}
    options = {letter: str(there[letter]) for letter in ascii_uppercase if letter in there}
    return Row(
        index=str(there.get("index", "")),
        question=str(there["question"]),
        answer=str(there.get("answer", "")),
        options=options,
        hint=str(there.get("hint", "")),
    )


def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and value != value)


def message_text(message: Sequence[Mapping[str, str]]) -> str:
    """The text of a message with picture placeholders: `<image>`, or `Image-1: <image>` lines.

    Several pictures are referenced as `<Image-1>` where they occur in the text; a block of all
    pictures gets no references.
    """
    count = sum(item["type"] == "image" for item in message)
    texts = [item["value"] for item in message if item["type"] == "text"]
    if count == 0:
        return "\n".join(texts)
    if count == 1:
        return "<image>\n" + "\n".join(texts)
    parts, number = [], 0
    for item in message:
        if item["type"] == "image":
            number += 1
            parts.append(f"<Image-{number}>")
        else:
            parts.append(item["value"])
    references = "".join(f"<Image-{i}>" for i in range(1, count + 1))
    lines = "".join(f"Image-{i}: <image>\n" for i in range(1, count + 1))
    return lines + "".join(parts).replace(references, "")


def model_class() -> Any:
    """The class to register with VLMEvalKit. Raises `DataError` if it is not installed."""
    vlmeval = _import_vlmeval()
    from vlmeval.vlm.base import BaseModel

    class MmmambaVLM(BaseModel):
        """A model of mmmamba; `model` is a loaded model or the path of one."""

        INSTALL_REQ = False
        INTERLEAVE = True

        def __init__(
            self,
            model: EvalModel | str,
            max_new_tokens: int = MAX_NEW_TOKENS,
            max_tiles: int | None = None,
        ):
            self.model = _load(model) if isinstance(model, str) else model
            self.max_new_tokens = max_new_tokens
            self.max_tiles = max_tiles

        def use_custom_prompt(self, dataset: str) -> bool:
            return style_of(dataset, vlmeval.dataset.DATASET_TYPE(dataset)) is not None

        def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, str]]:
            style = style_of(dataset, vlmeval.dataset.DATASET_TYPE(dataset))
            assert style is not None
            text = question_text(row_of(line), style.prompt)
            paths = self.dump_image(line, dataset)
            listed = [paths] if isinstance(paths, str) else list(paths)
            return [
                {"type": "text", "value": text},
                *({"type": "image", "value": path} for path in listed),
            ]

        def generate_inner(
            self, message: Sequence[Mapping[str, str]], dataset: str | None = None
        ) -> str:
            style = style_of(dataset) if dataset is not None else None
            enlarge = 1 if style is None else style.enlarge
            most = self.max_tiles or (MAX_TILES if style is None else style.max_tiles)
            files = [Path(item["value"]) for item in message if item["type"] == "image"]
            pictures = tuple(
                Picture(str(file), file=file, enlarge=1 if i else enlarge)
                for i, file in enumerate(files)
            )
            prompt = EvalPrompt(
                index=dataset or "message",
                text=message_text(message),
                pictures=pictures,
                max_tiles=tiles_per_picture(most, len(pictures)),
            )
            (answer,) = self.model.generate([self.model.encode(prompt)], self.max_new_tokens)
            return answer

    return MmmambaVLM


def register(name: str, model: EvalModel | str, **options: Any) -> Any:
    """Register a model in VLMEvalKit's `supported_VLM`; returns its constructor."""
    build = partial(model_class(), model=model, **options)
    from vlmeval.config import supported_VLM

    supported_VLM[name] = build
    return build


def evaluate(
    model: EvalModel, names: Sequence[str], options: EvalOptions, folder: Path
) -> dict[str, dict[str, Any]]:
    """Evaluate data sets with VLMEvalKit, given by suite or by its own names.

    The kit reuses every answer in its work folder, so each data set has a folder below `folder`
    whose name hashes everything its answers depend on. Returns the kit's scores by data set.
    """
    if options.limit is not None:
        raise DataError("VLMEvalKit asks whole data sets", "leave out --limit, or --with vlmeval")
    name = model.identity.name
    build = register(
        name,
        model,
        max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
        max_tiles=options.max_tiles,
    )
    from vlmeval.dataset import build_dataset
    from vlmeval.inference import infer_data_job

    found = {}
    with _data_folder(options.data):
        for wanted in names:
            title = find_suite(wanted).dataset if wanted in suite_names() else wanted
            dataset = build_dataset(title)
            if dataset is None:
                raise DataError(f"VLMEvalKit has no data set {title}", "use a name it lists")
            place = folder / f"{title}-{_answers_key(model, title, options)}"
            place.mkdir(parents=True, exist_ok=True)
            infer_data_job(build(), work_dir=str(place), model_name=name, dataset=dataset)
            scores = dataset.evaluate(
                str(_answers(place, name, title)), model="exact_matching", nproc=1
            )
            found[title] = _plain(scores)
    return found


def _answers_key(model: EvalModel, title: str, options: EvalOptions) -> str:
    """A short hash of the model, the table if there is one, the settings and the versions."""
    table = Path(os.environ.get(ENVIRONMENT) or "~/LMUData").expanduser() / f"{title}.tsv"
    try:
        kit = version("vlmeval")
    except PackageNotFoundError:
        kit = "unknown"
    return settings_key(
        {
            "model": model.identity.content_hash,
            "data": file_digest(table).hex(),
            "max_tiles": options.max_tiles,
            "max_new_tokens": options.max_new_tokens,
            "styles": [repr(style_of(title, kind)) for kind in (None, "MCQ")],
            "code": code_digest(),
            "adapter": file_digest(Path(__file__)).hex(),
            "versions": {**library_versions(), "vlmeval": kit},
            **model.identity.answers_depend_on,
        }
    )


def _answers(folder: Path, name: str, title: str) -> Path:
    for ending in ENDINGS:
        if (folder / f"{name}_{title}{ending}").is_file():
            return folder / f"{name}_{title}{ending}"
    raise DataError(f"VLMEvalKit wrote no answers {name}_{title} into {folder}")


def _plain(scores: Any) -> dict[str, Any]:
    """A table or mapping of scores as JSON values."""
    if hasattr(scores, "to_dict"):
        return {str(k): _numbers(v) for k, v in scores.to_dict(orient="list").items()}
    return {str(key): _numbers(value) for key, value in dict(scores).items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def _load(path: str) -> EvalModel:
    from mmmamba_cli.evaluate.model_adapter import load_eval_model
    from mmmamba_cli.runs import resolve_path

    return load_eval_model(resolve_path(Path(path)))


def _import_vlmeval() -> Any:
    # Importing vlmeval disables certificate verification for the whole process; restore it.
    verifying = ssl._create_default_https_context
    try:
        import vlmeval
        import vlmeval.config
        import vlmeval.dataset
    except ImportError as error:
        raise DataError(f"VLMEvalKit cannot be imported: {error}", INSTALL) from error
    finally:
        ssl._create_default_https_context = verifying
    return vlmeval


@contextmanager
def _data_folder(data: Path | None) -> Iterator[None]:
    """Set VLMEvalKit's data folder while the context is active."""
    before = os.environ.get(ENVIRONMENT)
    if data is not None:
        os.environ[ENVIRONMENT] = str(data)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ENVIRONMENT, None)
        else:
            os.environ[ENVIRONMENT] = before
