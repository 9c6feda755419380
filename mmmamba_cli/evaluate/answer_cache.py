"""Append-only JSON-lines cache of answers, for resuming an evaluation.

The file name has a hash of all settings that can change an answer, and the first line holds them.
Further lines are answers, and batch limits that hold from there on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.evaluate.batching import BatchLimit
from mmmamba_cli.evaluate.process_group import SINGLE_PROCESS, ProcessGroup

INDEX, PREDICTION, LIKELIHOODS, LIMIT = "index", "prediction", "log_likelihoods", "limit"
HEADER = "answers_to"
# Settings that the user does not choose; a change of them is reported if cached answers are unused.
IMPLICIT_SETTINGS = ("model", "questions", "data", "pictures", "code", "versions")


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short hash of everything that can change an answer."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class AnswerRecord:
    """A model's answer to one row, with the log-likelihoods of the choices, if there are any."""

    index: str
    text: str
    log_likelihoods: tuple[float, ...] = ()


class AnswerCache(AbstractContextManager["AnswerCache"]):
    """The answers of one model to one suite under one set of settings; a context manager.

    `answers` maps row indexes to cached answers, `limit` is the current batch limit, and
    `before_limit` the indexes answered before it was set. A last line cut short by a crash is
    dropped with a call of `warn`. `say` reports cached answers that are unused, and the settings
    that changed.

    With several processes, all open the cache and make the same changes to it; only process 0 reads
    and writes the file.

    Raises:
        DataError: for a damaged line before the last.
        RunError: if another command is writing to the file.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
        say: Callable[[str], None] = lambda text: None,
        group: ProcessGroup = SINGLE_PROCESS,
    ):
        self.file = folder / f"predictions-{settings_key(settings)}.jsonl"
        self.answers: dict[str, AnswerRecord] = {}
        self.limit: BatchLimit | None = None
        self.before_limit: frozenset[str] = frozenset()
        self._settings = dict(settings)
        self._warn = warn
        self._say = say
        self._group = group
        self._handle: IO[bytes] | None = None

    def __enter__(self) -> AnswerCache:
        try:
            state = self._group.run_on_main(self._open)
        except BaseException:
            # The other processes did not get what process 0 read.
            self._close()
            raise
        self.answers, self.limit, self.before_limit = state
        return self

    def _open(self) -> tuple[dict[str, AnswerRecord], BatchLimit | None, frozenset[str]]:
        """Lock and read the file; return `answers`, `limit` and `before_limit`."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = self.file.open("a+b")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise RunError(
                f"{self.file} is being written by another mmmamba command", "wait for it"
            ) from error
        self._handle = handle
        self._read(handle)
        return self.answers, self.limit, self.before_limit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def add(self, answers: list[AnswerRecord]) -> None:
        """Append answers and flush them to disk."""
        records = []
        for answer in answers:
            self.answers[answer.index] = answer
            record: dict[str, Any] = {INDEX: answer.index, PREDICTION: answer.text}
            if answer.log_likelihoods:
                record[LIKELIHOODS] = list(answer.log_likelihoods)
            records.append(record)
        self._append(records)

    def set_limit(self, limit: BatchLimit) -> None:
        """Set the batch limit of the following batches."""
        self.limit, self.before_limit = limit, frozenset(self.answers)
        self._append([{LIMIT: limit.as_dict()}])

    def _append(self, records: list[dict[str, Any]]) -> None:
        if not self._group.is_main:
            return
        assert self._handle is not None
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        self._handle.write("".join(lines).encode())
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _read(self, handle: IO[bytes]) -> None:
        handle.seek(0)
        good = 0
        for number, line in enumerate(handle, start=1):
            record = _parse(line)
            if record is None:
                if handle.read(1):
                    raise self._damaged(number)
                self._warn(f"{self.file}: the last line was cut short and is dropped")
                break
            try:
                self._add_record(record, number)
            except (LookupError, TypeError, ValueError) as error:
                raise self._damaged(number) from error
            good += len(line)
        # Drop an incomplete last line; writes append after the last complete one.
        handle.truncate(good)
        handle.seek(0, os.SEEK_END)
        if good == 0:
            self._report_unused_files()
            self._append([{HEADER: self._settings}])

    def _damaged(self, number: int) -> DataError:
        return DataError(
            f"{self.file}: line {number} is damaged", "delete the line, or the file to start over"
        )

    def _report_unused_files(self) -> None:
        """Report kept answers that are not reused because pictures, code or versions changed."""
        for file in sorted(self.file.parent.glob("predictions-*.jsonl")):
            if file == self.file:
                continue
            with file.open("rb") as handle:
                header = (_parse(handle.readline()) or {}).get(HEADER)
            if not isinstance(header, dict):
                continue
            differ = [
                key for key in IMPLICIT_SETTINGS if header.get(key) != self._settings.get(key)
            ]
            chosen = [key for key in self._settings if key not in IMPLICIT_SETTINGS]
            if differ and all(header.get(key) == self._settings[key] for key in chosen):
                self._say(
                    f"answers kept in {file.name} are not taken, all are asked again: "
                    f"{', '.join(differ)} changed since"
                )

    def _add_record(self, record: dict[str, Any], number: int) -> None:
        if number == 1:
            if record.get(HEADER) != self._settings:
                raise DataError(
                    f"{self.file} does not say that its answers are to this suite, model and "
                    "settings",
                    "move it away to start over",
                )
        elif LIMIT in record:
            self.limit = _parse_limit(record[LIMIT])
            self.before_limit = frozenset(self.answers)
        else:
            answer = _parse_answer(record)
            if self.answers.get(answer.index, answer) != answer:
                raise ValueError("a row has two answers")
            self.answers[answer.index] = answer


def _parse(line: bytes) -> dict[str, Any] | None:
    """A complete line as a record; None if the line is incomplete or not a JSON object."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _parse_answer(record: Mapping[str, Any]) -> AnswerRecord:
    """An answer. Raises `LookupError`, `TypeError` or `ValueError` for other values."""
    index, text, scores = record[INDEX], record[PREDICTION], record.get(LIKELIHOODS, [])
    if not (isinstance(index, str) and isinstance(text, str) and isinstance(scores, list)):
        raise TypeError("an answer has values of other types")
    # Lone surrogates, which no file of results can hold.
    (index + text).encode()
    return AnswerRecord(index, text, tuple(map(float, scores)))


def _parse_limit(record: Mapping[str, Any]) -> BatchLimit:
    """A batch limit. Raises `TypeError` or `ValueError` for other values."""
    limit = BatchLimit(**record)
    if any(type(value) is not int for value in record.values()):
        raise TypeError("a batch limit has values of other types")
    if limit.prompts < 1 or limit.columns < 0 or limit.given < 0:
        raise ValueError("a batch limit is not positive")
    return limit
