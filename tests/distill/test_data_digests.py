"""Digests of data are computed before training, without warnings that training repeats."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path

from mmmamba_cli.distill.training_settings import data_digests
from mmmamba_cli.recipe import Data


def test_no_warning_about_members_without_a_sample(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    members = {"a.json": json.dumps({"conversations": turns}), "notes.txt": "by hand"}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = data_digests(Data(train=str(tmp_path / "s.tar")))
    assert found is not None
    assert set(found) == {"train"}
    assert not warned
