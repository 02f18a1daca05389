"""README, docs and examples against the code: what they show must exist and be accepted."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import chv
from chv import cli, errors, image_cli, ranges, remote
from chv.api.app import NOT_BUILT, ROOT, routes
from chv.api.client import Client
from chv.testing import Console, Guest, plugin
from chv.vmm import Vmm

HERE = Path(__file__).parents[2]
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
EXAMPLES = sorted(path for path in (HERE / "examples").glob("*.py") if path.stem != "__init__")
SHELL = ("sh", "shell", "bash", "console")
OPERATORS = {"&", "&&", "||", "|", ";", ">", ">>", "<"}


class Block(NamedTuple):
    """A fenced block; ``line`` is that of its first line of text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


@cache
def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of all pages, in the given languages if there are any."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(page, line, match[1], match[2]))
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def by_place(block: Block) -> str:
    return block.where


# -- what the blocks hold ----------------------------------------------------------------


def test_every_block_says_its_language() -> None:
    assert len(blocks()) > 30
    known = {*SHELL, "python", "cython", "json", "text"}
    assert [block.where for block in blocks() if block.language not in known] == []


@pytest.mark.parametrize("block", blocks("python"), ids=by_place)
def test_python_compiles(block: Block) -> None:
    compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")


@pytest.mark.parametrize("block", blocks("json"), ids=by_place)
def test_json_is_json(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.skipif(importlib.util.find_spec("Cython") is None, reason="Cython is not installed")
@pytest.mark.parametrize("block", blocks("cython"), ids=by_place)
def test_cython_compiles(block: Block, tmp_path: Path) -> None:
    (tmp_path / "device.pyx").write_text(block.text)
    package = Path(chv.__file__).parents[1]
    command = [sys.executable, "-m", "cython", "-Werror", "-I", str(package), "device.pyx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- command lines -----------------------------------------------------------------------


class Command(NamedTuple):
    """One command of a shell block, and what the block shows below it."""

    where: str
    words: list[str]
    output: str


def commands() -> Iterator[Command]:
    for block in blocks(*SHELL):
        lines = re.sub(r"\\\n\s*", "", block.text)
        if block.language == "console":
            for match in re.finditer(r"^\$ (.*)\n((?:(?!\S*[$#] ).*\n)*)", lines, re.MULTILINE):
                yield Command(block.where, split(match[1]), match[2])
            continue
        rest = ""
        for line in lines.splitlines():
            rest = f"{rest}\n{line}" if rest else line
            try:
                words = split(rest)
            except ValueError:  # a quoted word goes on in the next line
                continue
            yield Command(block.where, words, "")
            rest = ""
        assert not rest, f"{block.where}: a quote is not closed"


def split(line: str) -> list[str]:
    """The words of a command up to the first operator of the shell."""
    words = shlex.split(line, comments=True)
    end = next((number for number, word in enumerate(words) if word in OPERATORS), len(words))
    return words[:end]


def chv_commands() -> list[Command]:
    return [command for command in commands() if command.words[:1] == ["chv"]]


def curl_commands() -> list[Command]:
    return [command for command in commands() if command.words[:1] == ["curl"]]


def by_words(command: Command) -> str:
    return f"{command.where}: {' '.join(command.words)[:60]}"


@pytest.mark.parametrize("command", [c for c in chv_commands() if not c.output], ids=by_words)
def test_chv_takes_the_command_line(command: Command) -> None:
    arguments = command.words[1:]
    if arguments[0] == "remote":
        options = remote.build_parser().parse_args(arguments[1:])
        assert options.api_socket
        assert options.command not in remote.UNBUILT
        if options.command != "create":  # it reads a file
            remote.prepare(options)
        return
    if arguments[0] == "image":
        assert image_cli.build_parser().parse_args(arguments[1:]).command == "entries"
        return
    options = cli.build_parser().parse_args(arguments)
    cli._refuse_unbuilt(options)
    config = cli.read_config(options)
    assert config is not None or options.api_socket


@pytest.mark.parametrize("command", [c for c in chv_commands() if c.output], ids=by_words)
def test_chv_says_what_the_page_shows(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.words[1:]) == 1  # these stop before anything runs
    assert capsys.readouterr().err == command.output


@pytest.mark.parametrize("command", curl_commands(), ids=by_words)
def test_curl_asks_for_what_there_is(command: Command) -> None:
    url = next(word for word in command.words if word.startswith("http://"))
    endpoint = url.removeprefix(f"http://localhost{ROOT}")
    route = routes(Vmm())[endpoint]
    body = command.words[command.words.index("-d") + 1] if "-d" in command.words else ""
    assert ("-XPUT" in command.words) == (route.verb == "PUT")
    assert bool(body) == (route.body is not None)
    if route.body is not None:
        route.body(body.encode())


def test_the_commands_are_found() -> None:
    assert len(chv_commands()) > 10
    assert len(curl_commands()) > 8


# -- names -------------------------------------------------------------------------------


def attributes() -> set[str]:
    """What ``vm.`` may be followed by: a VM's or a guest's members."""
    vm = chv.VM(kernel="/k")
    with Guest(kernel="/k") as guest:
        names = {*dir(vm), *dir(guest)}
    vm.delete()
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_endpoint_and_attribute_exists(page: Path) -> None:
    known = {*routes(Vmm()), *NOT_BUILT}
    members = {f"vm.{name}" for name in attributes()}
    text = page.read_text(encoding="utf-8")
    code = [*inline_code(page), *(b.text for b in blocks("python") if b.page == page)]
    named = {name for part in code for name in re.findall(r"(?<![\w./-])vmm?\.[a-z][a-z_-]*", part)}
    named -= {"vm.py", "vmm.py"}
    assert named - known - members == set()
    assert set(re.findall(rf"{ROOT}([a-z][a-z.-]*)", text)) - known == set()


def test_the_guide_has_every_endpoint_with_its_verb() -> None:
    text = prose(HERE / "docs/guide.md")
    table = re.findall(r"^\| `(vmm?\.[a-z-]+)` \| (\w+) \| ([^|]*)\|", text, re.MULTILINE)
    found = {name: (verb, bool(body.strip())) for name, verb, body in table}
    assert found == {name: (route.verb, route.body is not None) for name, route in routes(Vmm()).items()}


def test_the_guide_has_every_option() -> None:
    named = set(re.findall(r"`(--?[A-Za-z][\w-]*)", prose(HERE / "docs/guide.md")))
    resize = {"--cpus", "--memory", "--balloon"}
    assert set(cli.option_table()) - named == set()
    assert named - set(cli.option_table()) - resize == {"-vv"}


def test_the_guide_sorts_options_into_built_and_unbuilt() -> None:
    section = prose(HERE / "docs/guide.md").split('### What answers "not yet"')[1].split("\n## ")[0]
    listed = set(re.findall(r"`(--[\w-]+)`", section.split("; `--console`")[0]))
    later = next(g for g in cli.build_parser()._action_groups if g.title and g.title.startswith("known"))
    assert listed == {option for action in later._group_actions for option in action.option_strings}


def test_the_guide_has_every_command_of_remote() -> None:
    code = {word for part in inline_code(HERE / "docs/guide.md") for word in part.split()}
    assert {*remote.SIMPLE, "create", "resize"} - code == set()


def test_the_guide_has_every_exception_with_its_status() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", prose(HERE / "docs/guide.md"), re.MULTILINE)
    classes = [
        kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, chv.Error)
    ]
    assert dict(rows) == {kind.__name__: str(kind.status) for kind in classes if kind is not chv.Error}


@pytest.mark.parametrize(
    ("heading", "page", "owner"),
    [
        ("### Methods", "guide.md", chv.VM),
        ("### Guest", "testing.md", Guest),
        ("`chv.testing.Console` works", "testing.md", Console),
        ("`chv.api.client.Client` has", "guide.md", Client),
    ],
)
def test_members_that_are_listed_exist(heading: str, page: str, owner: Any) -> None:
    section = prose(HERE / "docs" / page).split(heading)[1].split("\n\n#")[0]
    first_column = "".join(re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE))
    names = set(re.findall(r"`([a-z]\w*)\(", first_column)) or set(
        re.findall(r"`([a-z]\w*)`", section.split("\n\n")[0])
    )
    assert len(names) > 4
    assert {name for name in names if not hasattr(owner, name)} == set()


def test_parameters_that_are_listed_exist() -> None:
    section = prose(HERE / "docs/testing.md").split("### Guest")[1].split("\n### ")[0]
    for name, text in re.findall(r"^\| `(\w+)\(([^`]*)\)`", section, re.MULTILINE):
        parameters = inspect.signature(getattr(Guest, name)).parameters
        for part in filter(None, text.split(", ")):
            parameter, _, default = part.partition("=")
            assert parameter in parameters
            if default:
                assert repr(parameters[parameter].default) == default.replace('"', "'")


def test_the_plugins_options_are_listed() -> None:
    text = prose(HERE / "docs/testing.md")
    rows = re.findall(r"^\| `--chv-(\w+)` \| `chv_(\w+)` \|", text, re.MULTILINE)
    assert [first for first, _ in rows] == [second for _, second in rows] == list(plugin._OPTIONS)


def test_the_ports_that_are_taken_are_listed() -> None:
    rows = re.findall(
        r"^\| 0x([0-9a-f]+)(?:(?: to |, )0x([0-9a-f]+))? \|", prose(HERE / "docs/devices.md"), re.MULTILINE
    )
    listed = {(int(first, 16), int(last or first, 16)) for first, last in rows}
    assert listed == {(base, base + size - 1) for base, size in ranges.PORTS.values()}


# -- links -------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The anchor that a heading gets on the usual forges."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            broken.append(target)
        elif fragment:
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            if fragment not in map(anchor, headings):
                broken.append(target)
    assert broken == []


def test_every_page_and_example_can_be_found() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [
        page.name for page in PAGES[1:] if f"({page.name}" not in text and f"/{page.name}" not in text
    ] == []
    assert "examples" in (HERE / "README.md").read_text(encoding="utf-8")


# -- examples ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_explains_itself(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    specification = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    main: Callable[[], object] = module.main
    monkeypatch.setattr(sys, "argv", [path.stem, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert (module.__doc__ or "").splitlines()[0] in capsys.readouterr().out
