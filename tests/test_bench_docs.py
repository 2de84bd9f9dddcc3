"""Every `fdpass-bench` command in the documentation is one that the command line takes; nothing is measured here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from fdpass_bench import cli, options

ROOT = Path(__file__).parent.parent
if not (ROOT / "docs").exists():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)

#: What stands where a figure is still to be taken: the tool may not know the command of that block yet.
_UNTAKEN = "TODO-FIGURE"


def commands(text: str) -> list[str]:
    """Those of a page: after a prompt in a console block, and between backquotes in a sentence."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown = [line for block in blocks if _UNTAKEN not in block for line in re.findall(r"^\$ (fdpass-bench\b.*)$", block, re.MULTILINE)]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return shown + re.findall(r"`(fdpass-bench [^`\[]+)`", prose)


FOUND = [
    pytest.param(line, id=f"{page.name}: {line}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for line in commands(page.read_text())
]


def taken(line: str) -> None:
    """Raises click.ClickException when the command line does not take it."""
    words = shlex.split(line, comments=True)[1:]
    if words and words[0] in ("balance", "pass"):
        # Which options belong together these two decide themselves, when they run.
        assert cli.command.main(args=words, prog_name="fdpass-bench", standalone_mode=False) == 0
    elif words and not words[0].startswith("-"):
        cli.command.commands[words[0]].make_context(words[0], words[1:])


@pytest.fixture(autouse=True)
def nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where --json may write
    for measuring in ("_measure", "_price"):
        monkeypatch.setattr(cli, measuring, lambda *asked: 0)
    # Nobody serves there, and nothing was interrupted.
    monkeypatch.setattr(options, "with_targets", lambda asked, campaign: (campaign, []))
    monkeypatch.setattr(cli, "_resume", lambda ctx, file: 0)


@pytest.mark.parametrize("line", FOUND)
def test_a_command_of_the_documentation_is_taken(line: str) -> None:
    try:
        taken(line)
    except click.ClickException as error:
        if re.search(r"\b(pip|apt) install\b", error.format_message()):
            pytest.skip(error.format_message())  # a peer
        raise


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```console\n$ fdpass-bench balance --scenario idel\n```\n", "idel"),
        ("See `fdpass-bench balance --scenario steady --bursts 2`.", "--bursts"),
        ("```console\n$ fdpass-bench balance --peer ngnix\n```\n", "ngnix"),
        ("```console\n$ fdpass-bench who --prot 8000\n```\n", "--prot"),
    ],
)
def test_one_that_is_not_is_found(text: str, said: str) -> None:
    (line,) = commands(text)
    with pytest.raises(click.ClickException, match=said):
        taken(line)
