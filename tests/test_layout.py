"""The shape of the project: imports go down the floors and never up, importing it starts nothing, every border says who owns what."""

import ast
import json
import re
from pathlib import Path

import fdpass_bench
import pytest

import fdpass

PACKAGE = Path(fdpass.__file__).parent
BENCH = Path(fdpass_bench.__file__).parent
NATIVE = PACKAGE.parent / "_native"

FLOORS = [
    {"fdpass.errors", "fdpass._native"},
    {"fdpass._syscall", "fdpass._frames"},
    {"fdpass.fds"},
    {"fdpass.limits", "fdpass._board", "fdpass._memory"},
    {"fdpass.ancillary", "fdpass._store", "fdpass._queue"},
    {"fdpass._claims"},
    {"fdpass._carriers", "fdpass.start", "fdpass.endpoint"},
    {"fdpass.handles"},
    {"fdpass._transit"},
    {"fdpass.channel", "fdpass.strategies.contract"},
    {"fdpass.listener", "fdpass.reduction", "fdpass.aio.channel"},
    {"fdpass.dispatched", "fdpass.aio.loops"},
    {"fdpass.strategies.shared", "fdpass.strategies.reuseport", "fdpass.strategies.dispatch", "fdpass.aio.server", "fdpass.aio.uvloops"},
    {"fdpass.strategies", "fdpass._launch", "fdpass.aio"},
    {"fdpass._worker"},
    {"fdpass._process"},
    {"fdpass._succession"},
    {"fdpass.workers"},
    {"fdpass.completion", "fdpass.exposition"},
    {"fdpass"},
    {"fdpass_bench", "fdpass_bench._loadgen"},
    {
        f"fdpass_bench.{name}"
        for name in (
            "answer",
            "contenders",
            "estimate",
            "loadgen",
            "measure",
            "peers",
            "peer_apps.application",
            "records",
            "scenarios",
            "sockdiag",
            "theory",
            "waiting",
        )
    },
    {f"fdpass_bench.{name}" for name in ("answer_async", "clients", "curves", "holders", "price", "screens", "tables")},
    {"fdpass_bench.compare", "fdpass_bench.strategy", "fdpass_bench.target"},
    {"fdpass_bench.formats", "fdpass_bench.plots"},
    {"fdpass_bench.page"},
    {"fdpass_bench.servers", "fdpass_bench.serve"},
    {"fdpass_bench.runs", "fdpass_bench.steady"},
    {"fdpass_bench.sharing", "fdpass_bench.longlived", "fdpass_bench.loaded", "fdpass_bench.figures", "fdpass_bench.scenario_tables"},
    {"fdpass_bench.balance", "fdpass_bench.diagnosis", "fdpass_bench.matrix"},
    {"fdpass_bench.sweep_tables"},
    {"fdpass_bench.report"},
    {f"fdpass_bench.{name}" for name in ("campaign", "doctor", "progress", "publish", "who")},
    {"fdpass_bench.checkpoint", "fdpass_bench.options"},
    {"fdpass_bench.cli"},
    {"fdpass_bench.__main__"},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}

#: The public surface, as far as it exists: name and who uses it.
PUBLIC = [
    "send_fds",
    "recv_fds",
    "Message",
    "OwnedFd",
    "Pipe",
    "Channel",
    "SocketHandle",
    "register",
    "unregister",
    "registered",
    "store_stats",
    "raise_fd_limit",
    "get_context",
    "listen",
    "Endpoint",
    "Listener",
    "WorkerGroup",
    "metrics",
    "wait_for_completion_or_failure",
    "FdPassError",
    "ClosedError",
    "EndOfChannel",
    "BrokenChannelError",
    "ProtocolError",
    "DescriptorsLostError",
    "TicketError",
    "PeerRefusedError",
    "WrongDescriptorError",
    "WorkerDied",
]


def module_name(path):
    parts = path.relative_to((BENCH if BENCH in path.parents else PACKAGE).parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted([*PACKAGE.rglob("*.py"), *BENCH.rglob("*.py")])}
MODULES = {*SOURCES, "fdpass._native", "fdpass_bench._loadgen"}


class Imports(ast.NodeVisitor):
    """Every module that a file imports, at the top and inside functions; what only a type checker sees does not count."""

    def __init__(self, name, is_package):
        self.package = name if is_package else name.rpartition(".")[0]
        self.found = set()

    def visit_If(self, node):
        checking = node.test.id if isinstance(node.test, ast.Name) else getattr(node.test, "attr", "")
        for statement in node.orelse if checking == "TYPE_CHECKING" else [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
        for alias in node.names:
            # "from fdpass import _syscall" imports a file of the package, "from fdpass import OwnedFd" the package itself.
            inner = f"{base}.{alias.name}"
            self.found.add(inner if inner in MODULES else base)


def imports(name, source=None):
    visitor = Imports(name, name in SOURCES and SOURCES[name].name == "__init__.py")
    visitor.visit(ast.parse(source if source is not None else SOURCES[name].read_text()))
    return visitor.found


def upward(name, found):
    """The imports that are not from a floor below."""
    return {other for other in found if other.partition(".")[0] in ("fdpass", "fdpass_bench") and FLOOR[other] >= FLOOR[name]}


# -------------------------------------------------------------------------------------------------------------- floors


def test_every_file_has_a_floor():
    assert set(FLOOR) == MODULES
    assert sum(map(len, FLOORS)) == len(FLOOR)


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_from_floors_below(name):
    assert upward(name, imports(name)) == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from fdpass.errors import ClosedError\nfrom fdpass import _syscall\nimport os", set()),
        ("import fdpass.channel", {"fdpass.channel"}),
        ("from fdpass import fds", {"fdpass.fds"}),
        ("from fdpass import OwnedFd", {"fdpass"}),
        ("from . import limits", {"fdpass.limits"}),
        ("from .channel import Channel", {"fdpass.channel"}),
        ("def later():\n    from fdpass.workers import WorkerGroup", {"fdpass.workers"}),
        ("try:\n    import fdpass.limits\nexcept ImportError:\n    pass", {"fdpass.limits"}),
        ("from fdpass_bench import measure", {"fdpass_bench.measure"}),
        ("if TYPE_CHECKING:\n    import fdpass.channel\nelse:\n    import fdpass.handles", {"fdpass.handles"}),
    ],
)
def test_the_check_sees_an_upward_import(source, expected):
    assert upward("fdpass.fds", imports("fdpass.fds", source)) == expected


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_opens_with_its_law(name):
    text = ast.get_docstring(ast.parse(SOURCES[name].read_text()))
    assert text
    # A line of law, and two or three more where it needs them.
    assert len([line for line in text.splitlines() if line]) <= 3


def test_the_page_shows_the_same_floors():
    page = PACKAGE.parent / "docs" / "internals.md"
    if not page.exists():
        pytest.skip("the documentation is not beside the tests")
    text = page.read_text().partition("\nfdpass/\n")[2].partition("\n_native/")[0]
    shown, floor = {"fdpass": FLOOR["fdpass"]}, -1
    for line in text.splitlines():
        if line[0] != " ":
            floor = int(line.split()[0])
        for name in re.findall(r"(?:\w+/)?\w+\.py|\w+/(?= )", line):
            shown["fdpass." + name.removesuffix(".py").rstrip("/").replace("/", ".")] = floor
        if "fdpass._native" in line:
            shown["fdpass._native"] = floor
    assert shown == {name: number for name, number in FLOOR.items() if name.partition(".")[0] == "fdpass"}


def test_the_page_shows_every_file_of_the_command():
    page = PACKAGE.parent / "docs" / "internals.md"
    if not page.exists():
        pytest.skip("the documentation is not beside the tests")
    text = page.read_text().partition("\nbench/fdpass_bench/")[2].partition("\nfdpass/\n")[0]
    assert sorted(re.findall(r"\w+\.py", text)) == sorted(file.name for file in BENCH.glob("*.py") if not file.name.startswith("__"))


# -------------------------------------------------------------------------------------------------------------- importing

WATCH = """
import json, os, sys, threading
before = set(os.listdir("/proc/self/fd"))
{statement}
status = open("/proc/self/status").read()
children = open(f"/proc/self/task/{{os.getpid()}}/children").read().split()
print(json.dumps({{
    "threads": int(status.split("Threads:")[1].split()[0]),
    "children": children,
    "descriptors": sorted(set(os.listdir("/proc/self/fd")) - before),
    "modules": sorted({{name.partition(".")[0] for name in sys.modules}}),
}}))
"""


@pytest.fixture
def after(run_python):
    """after(statement): what a fresh interpreter has once it ran it."""
    return lambda statement: json.loads(run_python(WATCH.format(statement=statement)).stdout)


HEAVY = {"asyncio", "click", "jinja2", "matplotlib", "rich", "psutil", "multiprocessing", "fdpass_bench", "subprocess", "ssl", "concurrent"}


def test_importing_it_starts_nothing_and_loads_little(after):
    found = after("import fdpass")
    assert (found["threads"], found["children"], found["descriptors"]) == (1, [], [])
    assert set(found["modules"]) & HEAVY == set()


@pytest.mark.parametrize("name", [name for name in PUBLIC if name in fdpass.__all__])
def test_every_public_name_is_there_and_starts_nothing(after, name):
    found = after(f"import fdpass; fdpass.{name}; assert {name!r} in dir(fdpass)")
    assert (found["threads"], found["children"], found["descriptors"]) == (1, [], [])
    assert set(found["modules"]) & {"asyncio", "click", "rich", "psutil", "fdpass_bench"} == set()


def test_asyncio_comes_with_fdpass_aio_and_not_before(after):
    assert "asyncio" not in after("import fdpass, fdpass.workers, fdpass.channel")["modules"]
    found = after("import fdpass; assert 'aio' in dir(fdpass); fdpass.aio.AsyncChannel(fdpass.Pipe()[0]).close()")
    assert "asyncio" in found["modules"]
    assert (found["threads"], found["children"], found["descriptors"]) == (1, [], [])
    assert set(found["modules"]) & {"uvloop", "click", "rich", "psutil", "fdpass_bench"} == set()
    assert fdpass.aio.__all__ == sorted(fdpass.aio.__all__)
    for name in fdpass.aio.__all__:
        assert getattr(fdpass.aio, name).__doc__


def test_the_public_surface():
    assert set(PUBLIC) <= set(fdpass.__all__)
    assert fdpass.__all__ == sorted(set(fdpass.__all__))
    for name in fdpass.__all__:
        assert getattr(fdpass, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fdpass.nothing  # noqa: B018  (the look-up itself is what is tested)


def test_each_lazy_name_is_known_to_type_checkers():
    # The same names stand under TYPE_CHECKING, where an editor looks for them.
    tree = ast.parse(SOURCES["fdpass"].read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name for node in block.body for alias in node.names} == set(fdpass._LATER)


# -------------------------------------------------------------------------------------------------------------- the C border

#: A comment, then the text up to the next ";", "{" or comment.
DECLARATION = re.compile(r"/\*(?P<comment>(?:[^*]|\*(?!/))*)\*/\s*(?P<text>[^;{/]*\([^;{/]*\));")
PROTOTYPE = re.compile(r"^[a-z_][\w ]*[\w*] ?\**(?P<name>(?:fdp|plat)_\w+)\(", re.MULTILINE)


def headers():
    if not NATIVE.is_dir():
        pytest.skip("installed without its C sources")
    return sorted(NATIVE.glob("*.h"))


def prototypes(text):
    """Name of each prototype in a header -> the comment right before it, None where there is none."""
    commented = {}
    for match in DECLARATION.finditer(text):
        name = PROTOTYPE.search(match["text"])
        if name:
            commented[name["name"]] = match["comment"]
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return {match["name"]: commented.get(match["name"]) for match in PROTOTYPE.finditer(code)}


def test_every_prototype_says_who_owns_what():
    found = {}
    for header in headers():
        found |= prototypes(header.read_text())
    assert {"fdp_send", "fdp_recv", "fdp_message_close", "plat_pair"} <= set(found)
    assert [name for name, comment in found.items() if "Ownership:" not in (comment or "")] == []


def test_the_check_sees_a_prototype_without_a_word():
    text = (
        "/* Ownership: none. */\nint fdp_one(int a);\n\n/* Says nothing. */\nvoid fdp_two(void);\nssize_t fdp_three(int a,\n    char *b);\n"
    )
    found = prototypes(text)
    assert list(found) == ["fdp_one", "fdp_two", "fdp_three"]
    assert [name for name, comment in found.items() if "Ownership:" not in (comment or "")] == ["fdp_two", "fdp_three"]


def test_every_c_file_opens_with_its_law():
    headers()
    for path in sorted([*NATIVE.glob("*.h"), *NATIVE.glob("*.c")]):
        assert path.read_text().startswith("/* "), path.name
