"""Where records come from and go to: files read, compared, and written as JSON, pages, CSV and Markdown. It draws and judges nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fdpass_bench import compare, formats, records
from fdpass_bench.report import console


class PublishError(Exception):
    """What cannot be read or written: one sentence, without its full stop."""


def refuse_unwritable(*files: str | None) -> None:
    """Raises PublishError where a file cannot be written, or where the last, a page, lacks what makes it."""
    if files[-1] is not None and (missing := [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]):
        raise PublishError(f"--html needs {' and '.join(missing)}: pip install 'fdpass[bench]'")
    named = [file for file in files if file is not None]
    if len(named) != len(set(named)):
        raise PublishError(f"{next(file for file in named if named.count(file) > 1)} cannot be written twice")
    for file in named:
        if file != "-":
            there = os.path.lexists(file)
            try:
                with open(file, "a"):
                    pass
                if not there:
                    os.unlink(file)  # nothing has been found yet, and may never be
            except OSError as error:
                raise PublishError(f"cannot write {file}: {error.strerror}") from error


def write_json(file: str | None, data: Mapping[str, Any]) -> None:
    """Raises PublishError."""
    _write(file, json.dumps(data, indent=2) + "\n")


def write_page(file: str | None, data: Mapping[str, Any], json_file: str | None) -> None:
    """The page of what was measured, made of its JSON alone, as report() makes it of `json_file`. Raises PublishError."""
    if file is None:
        return
    try:
        # As it will be read: what JSON does not have is not in the page either.
        name = os.path.basename(json_file) if json_file not in (None, "-") else "figures.json"
        record = records.record(json.loads(json.dumps(data)), name)
    except records.RecordError as error:
        raise PublishError(f"no page was written: {error}") from error
    _write(file, _page([record], []))


def report(files: Sequence[str], html_file: str | None, csv_file: str | None, markdown_file: str | None) -> int:
    """Shows, compares, writes; the exit status. Raises PublishError for what cannot be read, compared or written."""
    try:
        found = [records.read(file) for file in files]
    except records.RecordError as error:
        raise PublishError(str(error)) from error
    found = _told_apart(found, files)
    try:
        comparisons = [compare.compare(found[0], other) for other in found[1:]]
    except ValueError as error:
        raise PublishError(str(error)) from error
    for file in (html_file, csv_file, markdown_file):
        if file not in (None, "-") and file in files:
            raise PublishError(f"{file} is to be read: it is not overwritten")
    refuse_unwritable(csv_file, markdown_file, html_file)
    if html_file is not None:
        _write(html_file, _page(found, comparisons))
    if csv_file is not None:
        _write(csv_file, formats.as_csv(found))
    if markdown_file is not None:
        _write(markdown_file, formats.as_markdown(found, comparisons))
    if "-" not in (html_file, csv_file, markdown_file):
        formats.show(found, comparisons, console(sys.stdout))
    invalid = any(record.invalid for record in found)
    return 1 if invalid or any(comparison.worse for comparison in comparisons) else 0


def _told_apart(found: Sequence[records.Record], files: Sequence[str]) -> list[records.Record]:
    """By the file's name, or where two have the same one by their path."""
    names = [record.name for record in found]
    apart = [record.name if names.count(record.name) == 1 else file for record, file in zip(found, files, strict=True)]
    if len(set(apart)) < len(apart):
        raise PublishError(f"{next(name for name in apart if apart.count(name) > 1)} is given twice: there is nothing to compare")
    return [records.Record(name, record.kind, record.data) for name, record in zip(apart, found, strict=True)]


def _page(found: Sequence[records.Record], comparisons: Sequence[compare.Comparison]) -> str:
    from fdpass_bench import page  # a second and a half, and libraries that only a page needs

    return page.render(found, comparisons)


def _write(file: str | None, text: str) -> None:
    if file is None:
        return
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        with open(file, "w", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise PublishError(f"cannot write {file}: {error.strerror}") from error
