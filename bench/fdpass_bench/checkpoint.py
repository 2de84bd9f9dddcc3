"""The file beside the figures of a campaign that is under way: a line for all it was asked for, then a line for each step that has ended.
Whatever stops the command, the next one goes on from it. It measures nothing, prints nothing, and believes no line that is not whole."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import stat
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from fdpass_bench.campaign import Campaign, Playing, Result, Step, Trying
from fdpass_bench.runs import Run
from fdpass_bench.steady import Trial

SCHEMA = 1
SUFFIX = ".checkpoint"
_MOST_BYTES = 1 << 30  # of a line: a trial of five million requests has 7 columns of 8 bytes each
_MOST_OF_THE_FIRST = 1 << 24
_MOST_VALUES = 5_000_000  # of a column

#: What must be the same for figures to be of one study, by its key in the environment.
_SAME = {
    "fdpass": "fdpass",
    "implementation": "implementation",
    "python": "Python",
    "system": "system",
    "kernel": "kernel",
    "machine": "machine",
    "cpus": "number of processors",
    "usable_cpus": "number of usable processors",
}


class CheckpointError(Exception):
    """Why it cannot be begun, gone on from or written: one sentence, without its full stop."""


class Checkpoint:
    """An open one, which no other command can write meanwhile. It is closed by `with`; removed only by remove()."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        self._end = 0  # of what is whole
        self._header: Mapping[str, Any] = {}
        self._stopped = False
        #: Seconds since the epoch, of each time that a command went on from it.
        self.resumed: list[float] = []

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    @property
    def beside(self) -> str:
        """The file that it stands beside, which is how it is named to --resume."""
        return self.path.removesuffix(SUFFIX)

    @property
    def arguments(self) -> list[str]:
        """Those of the command that began it."""
        return list(self._header["arguments"])

    @property
    def files(self) -> dict[str, str | None]:
        """Where that command writes its JSON and its page. What the checkpoint stands beside is there, even if both were moved."""
        return dict(self._header["files"]) | {self._header["beside"]: self.beside}

    @property
    def began(self) -> float:
        """Seconds since the epoch."""
        return float(self._header["began"])

    @property
    def command(self) -> list[str]:
        return list(self._header["environment"]["command"])

    # Beginning and going on

    @classmethod
    def begin(
        cls,
        beside: str,
        files: Mapping[str, str | None],
        campaign: Campaign,
        arguments: Sequence[str],
        began: float,
        environment: Mapping[str, Any],
    ) -> Checkpoint:
        """`files`: by option, where the command will write; it stands beside that of the option `beside`. began: since the epoch.

        Raises CheckpointError, also where the runs of another command would be lost.
        """
        made = cls(*_opened(f"{files[beside]}{SUFFIX}", os.O_RDWR | os.O_CREAT))
        try:
            if count := made._count():
                raise CheckpointError(
                    f"{made.path} holds {count} {'run' if count == 1 else 'runs'} of a command that did not end: "
                    f"--resume {made.beside} goes on with it; remove it to begin anew"
                )
            os.ftruncate(made._file.fileno(), 0)
            made._header = {
                "checkpoint": SCHEMA,
                "arguments": list(arguments),
                "files": {option: file if file in (None, "-") else os.path.abspath(str(file)) for option, file in files.items()},
                "beside": beside,
                "began": began,
                "environment": dict(environment),
                "campaign": _asked(campaign),
            }
            made._append(made._header)
            _sync_folder(made.path)
        except BaseException:
            made._file.close()
            raise
        return made

    @classmethod
    def open(cls, file: str, environment: Mapping[str, Any]) -> Checkpoint:
        """By its own name, or by that of the file it stands beside. `environment`: this command's. Raises CheckpointError."""
        path = file if file.endswith(SUFFIX) else file + SUFFIX
        found = cls(*_opened(path, os.O_RDWR))
        try:
            found._read_header(environment)
        except BaseException:
            found._file.close()
            raise
        return found

    def _read_header(self, environment: Mapping[str, Any]) -> None:
        first = next(self._lines(), None)
        if first is None:
            raise CheckpointError(f"{self.path} breaks off in its first line: nothing was measured")
        header = first
        schema = header.get("checkpoint")
        if schema != SCHEMA:
            raise CheckpointError(f"{self.path} has schema {schema!r}; this version of fdpass-bench knows schema {SCHEMA}")
        form: dict[str, Any] = {"arguments": list, "files": dict, "beside": str, "began": float, "environment": dict, "campaign": list}
        whole = all(isinstance(header.get(key), kind) for key, kind in form.items())
        if not whole or not all(isinstance(word, str) for word in [*header["arguments"], *header["environment"].get("command", [0])]):
            raise CheckpointError(f"line 1 of {self.path} does not have the form of schema {SCHEMA}")
        before = header["environment"]
        for key, name in _SAME.items():
            if before.get(key) != environment[key]:
                raise CheckpointError(
                    f"{self.path} was begun with {name} {before.get(key)}, and this is {environment[key]}: "
                    "figures of two systems are not one study"
                )
        self._header = header

    def restore(self, campaign: Campaign) -> None:
        """Gives the campaign what it had measured. A last line that is not whole is dropped. Raises CheckpointError."""
        asked = _asked(campaign)
        if asked != self._header["campaign"]:
            pairs = zip([*asked, "nothing"], [*self._header["campaign"], "nothing"], strict=False)
            now, then = next((pair for pair in pairs if pair[0] != pair[1]), ("another order", "one"))
            raise CheckpointError(f"{self.path} was begun with {then}, and its arguments now mean {now}: these are not one study")
        self._file.seek(0)
        for number, data in enumerate(self._lines(), 1):
            try:
                if "resumed" in data:
                    self.resumed.append(float(data["resumed"]))
                elif number > 1:
                    campaign.take(_restored(campaign, data), float(data["seconds"]))
            except (LookupError, TypeError, ValueError, OverflowError, zlib.error) as error:
                raise CheckpointError(f"line {number} of {self.path} does not have the form of schema {SCHEMA}: {error}") from error
        os.ftruncate(self._file.fileno(), self._end)
        self.resumed.append(time.time())
        self._append({"resumed": self.resumed[-1]})

    # Reading

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Each whole line; one at the end that is not was being written when the command ended. Raises CheckpointError."""
        self._end, number = 0, 0
        most = _MOST_OF_THE_FIRST
        while line := self._file.readline(most + 1):
            number += 1
            if number == 1 and not _BEGINNING.match(line):
                raise CheckpointError(f"{self.path} is not a checkpoint of fdpass-bench")
            data = _parsed(line) if len(line) <= most else None
            if data is None:
                if len(line) > most or self._file.read(1):
                    raise CheckpointError(f"line {number} of {self.path} is not as it was written")
                return
            self._end += len(line)
            most = _MOST_BYTES
            yield data

    def _count(self) -> int:
        """How many runs it holds; 0 where it is empty. Raises CheckpointError where it is something else."""
        return sum("run" in line for line in self._lines())

    # Writing

    def keep(self, step: Step, result: Result, seconds: float) -> None:
        """What the next step gave: on the disk when this returns. Raises CheckpointError once it cannot, and then keeps no more."""
        if not self._stopped:
            self._append({_key(step): _recorded(result), "seconds": seconds})

    def _append(self, data: Mapping[str, Any]) -> None:
        text = json.dumps(data, separators=(",", ":")).encode()
        line = memoryview(b'["%08x",%b]\n' % (zlib.crc32(text), text))
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._file.fileno(), line[written:], self._end + written)
            os.fsync(self._file.fileno())
        except OSError as error:
            self._stopped = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error
        self._end += len(line)

    def remove(self) -> None:
        """All of it is in the figures' own file, or there is nothing in it. Raises CheckpointError."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass  # somebody threw it away meanwhile
        except OSError as error:
            raise CheckpointError(f"cannot remove {self.path}: {error.strerror}") from error


def _opened(path: str, flags: int) -> tuple[str, IO[bytes]]:
    try:
        # O_NONBLOCK: a named pipe would wait for its other end.
        fd = os.open(path, flags | os.O_NONBLOCK, 0o666)
    except FileNotFoundError as error:
        if os.path.exists(os.path.dirname(os.path.abspath(path))):
            raise CheckpointError(f"there is no {path}: nothing was interrupted that writes {path.removesuffix(SUFFIX)}") from error
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except OSError as error:
        raise CheckpointError(f"cannot {'write' if flags & os.O_CREAT else 'read'} {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path} is not a file")
    file = open(fd, "r+b")  # noqa: SIM115  # it goes to the Checkpoint
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.fstat(fd).st_nlink  # removed by the one that had it
        except BlockingIOError:
            taken = True
        except OSError:
            taken = False  # a file system without locks
        if taken:
            raise CheckpointError(f"{path} is being written by another fdpass-bench")
    except BaseException:
        file.close()
        raise
    return path, file


def _sync_folder(path: str) -> None:
    """The name of a new file lasts once its folder is on the disk."""
    with contextlib.suppress(OSError):
        fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


_BEGINNING = re.compile(rb'\["|\[?\Z')


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None of a line that is not whole."""
    text = line[12:-2]
    if line[:2] != b'["' or line[10:12] != b'",' or line[-2:] != b"]\n" or line[2:10] != b"%08x" % zlib.crc32(text):
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _asked(campaign: Campaign) -> list[str]:
    """All that the campaign measures, in words: another version of a server is another thing."""
    found = [repr(plan) for plan in campaign.plans]
    for loop in campaign.loops:
        found += [repr(loop.work), *(" ".join(filter(None, (one.kind, one.name, one.version))) for one in loop.servers)]
    return found


# -------------------------------------------------------------------------------- runs and trials, field by field


def _key(step: Step) -> str:
    return "run" if step.count else "calibration"


def _recorded(result: Result) -> dict[str, Any]:
    return {one.name: _FORMS[str(one.type)][0](getattr(result, one.name)) for one in _fields(type(result))}


def _restored(campaign: Campaign, data: Mapping[str, Any]) -> Result:
    """The next step's result. Raises KeyError, TypeError or ValueError for what is none."""
    if campaign.done == len(campaign.steps):
        raise ValueError("nothing more was asked for")
    step = campaign.steps[campaign.done]
    record = data[_key(step)]
    found = {one.name: _FORMS[str(one.type)][1](record[one.name]) for one in _fields(Run if isinstance(step, Playing) else Trial)}
    if isinstance(step, Playing):
        return Run(step.plan, **found)
    trial = Trial(**found)
    if isinstance(step, Trying) and (trial.server, trial.repeat) != (step.server.name, step.repeat):
        raise ValueError(f"{trial.server}, repeat {trial.repeat + 1}, is not what comes next")
    return trial


def _fields(kind: type[Run | Trial]) -> list[dataclasses.Field[Any]]:
    """A run's plan is known from its place."""
    return [one for one in dataclasses.fields(kind) if one.name != "plan"]


def _same(value: Any) -> Any:
    return value


def _plain(kind: type, *of: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """What JSON has itself: a `kind`, and if given the kinds of what is in it."""

    def read(value: Any) -> Any:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not _is(value, kind) or (of and not all(any(_is(one, each) for each in of) for one in inner)):
            raise ValueError(f"{str(value)[:40]!r} where there should be a {kind.__name__}")
        return value

    return _same, read


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _or_none(form: tuple[Callable[[Any], Any], Callable[[Any], Any]]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    write, read = form
    return (lambda value: None if value is None else write(value)), (lambda value: None if value is None else read(value))


def _column(values: Sequence[float] | array[Any], code: str = "d") -> str:
    """Every bit of each number, in as little as that takes."""
    return base64.b64encode(zlib.compress(array(code, values).tobytes(), 1)).decode()


def _values(text: Any, code: str = "d") -> array[Any]:
    if not isinstance(text, str):
        raise TypeError(f"{str(text)[:40]!r} where there should be a column")
    most = _MOST_VALUES * array(code).itemsize
    stream = zlib.decompressobj()
    raw = stream.decompress(base64.b64decode(text, validate=True), most + 1)
    if not stream.eof:
        raise ValueError("a column has no end")
    found: array[Any] = array(code)
    found.frombytes(raw)
    return found


def _with_gaps(values: Sequence[float | None]) -> dict[str, str]:
    none = [place for place, value in enumerate(values) if value is None]
    return {"values": _column([0.0 if value is None else value for value in values]), "none": _column(none, "q")}


def _gaps_again(record: Any) -> list[float | None]:
    found: list[float | None] = _values(record["values"]).tolist()
    for place in _values(record["none"], "q"):
        if not 0 <= place < len(found):
            raise ValueError(f"a column of {len(found)} has no place {place}")
        found[place] = None
    return found


def _keyed(form: tuple[Callable[[Any], Any], Callable[[Any], Any]]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """By a number, which a key of JSON is not."""
    write, read = form
    return (
        lambda value: {str(key): write(one) for key, one in value.items()},
        lambda record: {int(key): read(one) for key, one in _plain(dict)[1](record).items()},
    )


def _pair(value: Any) -> tuple[float, float]:
    first, second = _plain(list, float)[1](value)
    return first, second


#: By a field's annotation: how its value is written as JSON, and read again.
_FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "str": _plain(str),
    "int": _plain(int),
    "float": _plain(float),
    "str | None": _or_none(_plain(str)),
    "float | None": _or_none(_plain(float)),
    "list[int]": _plain(list, int),
    "list[int | None]": _plain(list, int, type(None)),
    "dict[str, int]": _plain(dict, int),
    "dict[str, Any]": _plain(dict),
    "dict[str, tuple[float, float]]": (_same, lambda record: {key: _pair(value) for key, value in _plain(dict)[1](record).items()}),
    "dict[int, int]": _keyed(_plain(int)),
    "dict[int, float]": _keyed(_plain(float)),
    "dict[int, array[float]]": _keyed((_column, _values)),
    "list[float]": (_column, lambda text: _values(text).tolist()),
    "list[float | None]": (_with_gaps, _gaps_again),
}
