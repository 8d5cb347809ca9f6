"""README.md, CONTRIBUTING.md and docs/: links lead somewhere; the commands, settings and files that they name exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from pydantic import BaseModel

from experiments import config
from experiments.arms import ARMS
from experiments.cli.main import app
from experiments.run.transfer import direction_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(p.relative_to(ROOT)): p for p in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]}
PACKAGES = ("storage", "pipeline", "actors", "experiments")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)")
CODE_FILE = re.compile(r"(?<![\w/.…<])(?:(?:storage|pipeline|actors|experiments|tests|benchmarks|docs)/[\w/.-]+\.\w+)")
GROUPS = {name for name, field in config.Settings.model_fields.items() if isinstance(field.default, BaseModel)}
SETTING = re.compile(rf"(?<![\w./-])({'|'.join(sorted(GROUPS))})\.([a-z]\w*)(?![\w(])")
FILE_ENDINGS = {"py", "json", "md", "yaml", "csv", "parquet", "zarr", "onnx"}
COMMANDS: Any = typer.main.get_command(app)


class Block(NamedTuple):
    """A fenced block: where it begins, its language, its text."""

    place: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [Block(f"{page}:{text.count(chr(10), 0, m.start()) + 1}", m[1], m[2]) for m in FENCE.finditer(text)]


@cache
def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))


def spans(page: str) -> Iterator[str]:
    """Inline code, with the table's escapes taken out."""
    for match in SPAN.finditer(prose(page)):
        yield match[2].replace("\\|", "|").strip()


@cache
def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{found[name]}" if found[name] else name)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    broken = []
    for target in LINK.findall(SPAN.sub("", prose(page))):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else ""
        if not file.exists() or not name or (anchor and anchor not in anchors(name)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_repository_that_is_named_exists(page: str) -> None:
    named = {name for span in spans(page) for name in CODE_FILE.findall(span)}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_python_block_compiles_and_imports_what_is_there() -> None:
    checked = 0
    for block in (b for page in PAGES for b in blocks(page) if b.language == "python"):
        for node in ast.walk(ast.parse(block.text, block.place)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
                missing = {alias.name for alias in node.names} - names_in(node.module)
                assert not missing, f"{block.place}: {node.module} has no {missing}"
                checked += 1
    assert checked > 10


@cache
def names_in(module: str) -> set[str]:
    """What a module of ours binds at its top level, read without importing it."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def shell_commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Place and words of every simple command in the page's bash blocks; `$NAME` is what the page sets it to."""
    scripts = [block for block in blocks(page) if block.language == "bash"]
    variables = dict(re.findall(r'^([A-Z_]+)="([^"]*)"$', "".join(block.text for block in scripts), re.MULTILINE))
    lines = [(block.place, line) for block in scripts for line in block.text.replace("\\\n", " ").splitlines()]
    for place, line in lines:
        line = re.sub(r"\$([A-Z_]+)\b", lambda name: variables.get(name[1], name[0]), line)
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "&", "|", "--"):  # `ray job submit … -- COMMAND` runs one more
                yield place, words
                words = []
            else:
                words.append(word)


def of_cardiomix(words: list[str]) -> list[str] | None:
    """The arguments of a call of cardiomix; None for another command."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if words[:3] == ["python", "-m", "experiments"]:
        return words[3:]
    return words[1:] if words and Path(words[0]).name == "cardiomix" else None


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The verb's command and its arguments. Raises KeyError for a verb that is not there."""
    command = COMMANDS
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse(words: list[str]) -> dict[str, Any]:
    """The values of a verb's parameters, checked as the command line does, without running it."""
    command, words = command_of(words)
    if hasattr(command, "commands"):  # --version and the like
        assert set(words) <= options_of(command), words
        return {}
    values: dict[str, Any] = command.make_context("cardiomix", list(words)).params
    return values


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}


def test_every_command_line_is_one_that_cardiomix_takes() -> None:
    checked, wrong = 0, []
    for place, words in ((p, of_cardiomix(w)) for page in PAGES for p, w in shell_commands(page)):
        if words is None:
            continue
        checked += 1
        try:
            values = parse(words)
            preset = values.get("preset") if values.get("preset") in config.PRESETS else "cpu"
            settings = config.preset(preset)
            if isinstance(values.get("vendors"), str):  # as `transfer` does
                settings = direction_settings(settings, values["vendors"].split(",")[0], None)
            document = config.override(settings, values.get("assignments") or []).model_dump()
            if isinstance(values.get("arms"), str):
                document["arms"] = tuple(values["arms"].split(","))
            config.validated(document, place)
            assert values.get("arm", "unet_ra") in ARMS, values["arm"]
        except Exception as error:
            detail = error.format_message() if hasattr(error, "format_message") else repr(error)
            wrong.append(f"{place}: cardiomix {' '.join(words)}: {detail}")
    assert wrong == []
    assert checked > 30


def test_every_command_that_is_named_in_a_sentence_has_its_verb_and_options() -> None:
    wrong = []
    for page in PAGES:
        for span in spans(page):
            words = span.split()
            if words[:1] != ["cardiomix"] or len(words) < 2 or words[1] == "VERB":
                continue
            try:
                for verb in words[2].split("|") if words[1] == "bank" else [""]:
                    command, rest = command_of([*words[1:2], verb, *words[3:]] if verb else words[1:])
                    unknown = {w.split("=")[0] for w in rest if w.startswith("-")} - options_of(command)
                    assert not unknown, unknown
            except (KeyError, AssertionError) as error:
                wrong.append(f"{page}: `{span}`: {error!r}")
    assert wrong == []


def test_every_make_target_is_there() -> None:
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for page in PAGES for _, words in shell_commands(page) if words[:1] == ["make"]}
    named |= {m[1] for page in PAGES for span in spans(page) if (m := re.match(r"make ([\w.-]+)", span))}
    assert len(named) > 5 and named - targets == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_is_named_exists(page: str) -> None:
    wrong = []
    for text in [*spans(page), *(block.text for block in blocks(page) if block.language != "python")]:
        for group, field in SETTING.findall(text):
            known = type(config.Settings.model_fields[group].default).model_fields
            if field not in known and field not in FILE_ENDINGS:
                wrong.append(f"{group}.{field}")
    assert wrong == []


def test_the_site_has_every_page_in_the_order_of_the_index() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    site = yaml.load((ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def pages(entries: Any) -> Iterator[str]:
        for entry in entries:
            if isinstance(entry, str):
                yield entry
            else:
                for below in entry.values():
                    yield from pages(below)

    order = list(pages(site["nav"]))
    outside = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md"}
    assert sorted(order) == sorted(outside.get(page, page.removeprefix("docs/")) for page in PAGES)
    linked = [re.sub(r"^\.\./", "", target) for target in LINK.findall(prose("docs/index.md"))]
    shown = [outside.get(target, target) for target in linked]
    assert [page for page in order if page in shown] == shown
