"""How a command talks: help that fits a screen, or an option that says all of it; what is allowed, where something is not; lists completed.
It knows click, and none of the commands."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

LINES = 40
ARGUMENTS = "fdpass_bench.arguments"  # of a context's meta: the command's, as they were written
#: "loops: connections per second.": an option of one scenario, of a family of them, or of another purpose that not everybody has.
_BELONGS = re.compile(r"[a-z -]+(, [a-z -]+)*: ")
_KINDS: Sequence[tuple[type, str]] = ((click.IntRange, "N"), (click.FloatRange, "X"), (click.Path, "FILE"), (click.Choice, "NAME"))


class Whole(click.IntRange):
    """An IntRange that says which numbers are allowed to what is none, too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number from {self.min} to {self.max}", param, ctx)
        number: int = super().convert(value, param, ctx)
        return number


class Group(click.Group):
    """A group that says which commands there are."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"there is no command {args[0]!r}; there are {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


class Command(click.Command):
    """A command whose --help has LINES lines at most. Where click's own would have more, options have a line each, those that belong to
    something are named only, the last lists are left out, and --help-all says all."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        whole = ctx.make_formatter()
        super().format_help(ctx, whole)
        text = whole.getvalue()
        if text.count("\n") <= LINES:
            formatter.write(text)
        else:
            paragraphs = inspect.cleandoc(self.help or "").split("\n\n")
            while (text := self._briefly(ctx, paragraphs)).count("\n") > LINES:
                # What is laid out by hand is a list, of which --help-all has all; an example stays.
                lists = [number for number, one in enumerate(paragraphs) if one.startswith("\b") and "xample" not in one.splitlines()[1]]
                if not lists:
                    break
                del paragraphs[lists[-1]]
            formatter.write(text)

    def _briefly(self, ctx: click.Context, paragraphs: Sequence[str]) -> str:
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text("\n\n".join(paragraphs))
        self._format_briefly(ctx, formatter)
        return formatter.getvalue()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), self._all]

    @property
    def _all(self) -> click.Option:
        # Hidden where --help has all of it already.
        return click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            hidden=True,
            callback=self._show_all,
            help="Show every option in full.",
        )

    def _show_all(self, ctx: click.Context, param: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            formatter = ctx.make_formatter()
            super().format_help(ctx, formatter)
            click.echo(formatter.getvalue().rstrip("\n"))
            ctx.exit()

    def _format_briefly(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option) and not param.hidden]
        own = [option for option in options if not _BELONGS.match(option.help or "")]
        names = [(_name(option), option) for option in own]
        left = max(len(name) for name, _ in names) + 2
        with formatter.section("Options"):
            room = formatter.width - formatter.current_indent
            for name, option in names:
                formatter.write(f"{'':{formatter.current_indent}}{name:{left}}{_cut(_said(option), room - left)}\n")
        others = ", ".join(option.opts[0] for option in options if option not in own)
        formatter.write_paragraph()
        formatter.write_text(f"Others: {others}. --help-all says what each means.")


def _name(option: click.Option) -> str:
    if option.is_flag:
        return option.opts[0]
    kind = option.metavar or next((word for of, word in _KINDS if isinstance(option.type, of)), "TEXT")
    return f"{option.opts[0]} {kind}"


def _said(option: click.Option) -> str:
    """Of a choice without other words, what there is to choose."""
    text = option.help or ""
    if text.startswith("[") and isinstance(option.type, click.Choice):
        return f"{', '.join(map(str, option.type.choices))}.  {text}"
    return text


def _cut(text: str, width: int) -> str:
    """The whole, or without the defaults, or its beginning."""
    text = " ".join(text.split())
    for shorter in (text, text.partition(" [default")[0], text.partition(";")[0] + "."):
        if len(shorter) <= width and shorter.count("[") == shorter.count("]"):
            return shorter
    return text[: width - 3].rsplit(" ", 1)[0] + " ..."


def listed(values: Callable[[], Iterable[str]]) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """A shell_complete for an option that takes several values between commas: the last is completed."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        given = set(before.split(","))
        return [CompletionItem(before + comma + value) for value in values() if value.startswith(last) and value not in given]

    return complete


@add_completion_class
class _Bash(BashComplete):
    """Bash breaks a word at a colon, which stands in the names of strategies, and completes what comes after it: so it gives the line here,
    and is given the rest of the word."""

    source_template = BashComplete.source_template.replace(
        'COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD',
        'COMP_LINE="${COMP_LINE:0:$COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS"',
    )
    _before = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ.get("COMP_LINE")
        if line is None:
            return super().get_completion_args()
        words = split_arg_string(line)
        incomplete = "" if line[-1:].isspace() else words.pop()
        if ":" in os.environ.get("COMP_WORDBREAKS", ""):
            before, colon, _ = incomplete.rpartition(":")
            self._before = (before + colon).rpartition("=")[2]
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        item.value = str(item.value).removeprefix(self._before)
        return super().format_completion(item)
