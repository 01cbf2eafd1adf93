"""The documents agree with the code: examples run, names and files exist, tables are complete, both READMEs match."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

import nanovllm.hub
from nanovllm.config import EngineArgs
from nanovllm.engine.input import UNSUPPORTED_PARAMETERS
from nanovllm.entrypoints.cli.main import COMMANDS
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULE_PAGES = ["design", "scheduler", "kv-cache", "attention", "sampling", "models", "text", "api", "cli",
                "structured-output", "embeddings"]  # fmt: skip

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Words that look like names of ours and are none.
NOT_OURS = {
    "enable_thinking",
    "RoPE",
    "LoRA",
    "PyPI",
    "ModelScope",
    "OpenAI",
    "TypeError",
    "ValueError",
    "collective_rpc",
    "get_metrics",
}


def fences(text: str) -> list[tuple[str, str]]:
    """(info string, content) of every fenced block."""
    return FENCE.findall(text)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def table(page: str, section: str) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    text = (ROOT / page).read_text(encoding="utf-8")
    body = re.split(r"^#+ ", text.split(f"\n## {section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.strip("|").split(" | ") for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@cache
def code() -> tuple[set[str], dict[str, set[str]], dict[str, set[str]]]:
    """Of the package: all names in it; class -> its bases; class -> names of its methods, fields and attributes."""
    names: set[str] = set()
    bases: dict[str, set[str]] = {}
    members: dict[str, set[str]] = {}
    for file in sorted((ROOT / "nanovllm").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names |= set(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(tree):
            names |= {
                value
                for field in ("name", "id", "attr", "arg", "value")
                if isinstance(value := getattr(node, field, None), str) and value.isidentifier()
            }
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
                members[node.name] = _members(node)
    return names, bases, members


def _members(tree: ast.ClassDef) -> set[str]:
    found = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            found.add(node.attr)
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def has_member(class_name: str, member: str) -> bool:
    _, bases, members = code()
    return member in members.get(class_name, ()) or any(has_member(base, member) for base in bases.get(class_name, ()))


def unknown_names(text: str) -> Iterator[str]:
    """``Class.member``, CamelCase and snake_case words that the package does not know."""
    names, _, members = code()
    for word in re.findall(r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", text):
        first, *rest = word.split(".")
        if first in members and rest:
            if not has_member(first, rest[0]):
                yield word
        elif (re.match(r"[A-Z][a-z]+[A-Z]", first) or "_" in first.strip("_")) and first not in names | NOT_OURS:
            yield word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_flowcharts_are_in_the_code(page: Path):
    for info, block in fences(page.read_text(encoding="utf-8")):
        if info == "mermaid":
            assert not list(unknown_names(block.replace("<br/>", " ")))


@pytest.mark.parametrize("name", MODULE_PAGES)
def test_a_module_page_shows_a_flowchart_first(name: str):
    assert fences((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))[0][0] == "mermaid"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flowcharts_are_well_formed(page: Path):
    node = r'\w+(?:\["[^"\]]+"\]|\{"[^"}]+"\})?'
    edge = re.compile(rf"{node}(?: (?:-->|-\.->)(?:\|[^|]+\|)? {node})*")
    for info, block in fences(page.read_text(encoding="utf-8")):
        if info != "mermaid":
            continue
        first, *lines = block.splitlines()
        assert re.fullmatch(r"flowchart (TD|LR)", first)
        for line in filter(None, map(str.strip, lines)):
            assert line == "end" or re.fullmatch(r'subgraph \w+\["[^"]+"\]', line) or edge.fullmatch(line), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_paths_between_backticks_exist(page: Path):
    names = code()[0] | NOT_OURS
    for quoted in re.findall(r"`([^`\n]+)`", prose(page.read_text(encoding="utf-8"))):
        if match := re.fullmatch(r"((?:[\w-]+/)*[\w-]+\.py)::(test_\w+)", quoted):
            assert re.search(rf"^(async )?def {match[2]}\(", (ROOT / "tests" / match[1]).read_text(), re.MULTILINE), (
                quoted
            )
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", quoted) and ("/" in quoted or quoted.endswith((".py", ".md"))):
            places = [ROOT, ROOT / "nanovllm", ROOT / "tests", ROOT / "scripts" / "demo_data"]
            assert quoted.startswith("build/") or any((place / quoted).exists() for place in places), (
                f"no file {quoted}"
            )
        elif re.fullmatch(r"[A-Z]\w+\.\w+(\(\))?", quoted) and quoted.split(".")[0] in code()[2]:
            assert not list(unknown_names(quoted)), quoted
        elif re.fullmatch(r"_?[a-z]\w*_\w*(\(\))?", quoted):
            assert quoted.removesuffix("()") in names, f"{quoted} is not a name of the code"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"\w+://", target):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(linked.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_hold_no_paths_of_a_machine(page: Path):
    assert not re.findall(r"(?<![\w.])/(?:work|opt|tmp|root|home|mnt|Users)\b", page.read_text(encoding="utf-8"))


# -- rooms -------------------------------------------------------------------------------------------------------------

SHARED = {"config", "errors", "hub", "inputs", "outputs", "pooling_params", "sampling_params"}


def imports(file: Path) -> Iterator[str]:
    """Names of the modules a file imports, wherever in it; ours without ``nanovllm.``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").removeprefix("nanovllm.")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("nanovllm.") for alias in node.names)


def test_rooms_import_only_what_the_design_allows():
    rows = table("docs/design.md", "Rooms")
    folders = {path.name for path in (ROOT / "nanovllm").iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert {row[0] for row in rows} == {f"`{folder}/`" for folder in folders}
    guarded = {"torch", *folders}
    for room, _, listed in rows:
        name = room.strip("`/")
        allowed = SHARED | {name} | set(re.findall(r"`([\w.]+)`", listed))
        for file in (ROOT / "nanovllm" / name).rglob("*.py"):
            for module in imports(file):
                first = module.split(".")[0]
                assert first not in guarded or first in allowed or module in allowed, f"{file.name} imports {module}"


@pytest.mark.parametrize("room", ["models", "layers"])
def test_models_and_layers_name_no_device(room: str):
    for file in (ROOT / "nanovllm" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                assert node.value not in ("cpu", "cuda", "npu"), file.name
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("cuda", "npu", "is_cuda"), file.name


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_checkpoint(folder, "qwen3", vocab_size=337, eos_token_id=332)
    qwen(folder)
    return folder


EXAMPLES = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (info, block) in enumerate(fences(page.read_text(encoding="utf-8")))
    if info == "python run"
]


@pytest.mark.parametrize("block", EXAMPLES)
def test_examples_run(block: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(nanovllm.hub, "DEMO_PATH", model)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0.01")
    exec(compile(block, "example", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


# -- the READMEs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readme", "section"), zip(READMES, ("Quick start", "快速开始"), strict=True), ids=("en", "zh")
)
def test_quick_start_is_two_commands_away(readme: Path, section: str):
    text = readme.read_text(encoding="utf-8")
    start, *others = re.split(r"^## ", text.split(f"## {section}\n", 1)[1], flags=re.MULTILINE)
    blocks = fences(start)
    assert blocks == fences(text)[:2] and [info for info, _ in blocks] == ["bash", "bash"] and others
    first, second = ([line for line in block.splitlines() if not line.startswith("#")] for _, block in blocks)
    environment = ["python3 -m venv .venv", ". .venv/bin/activate", "pip install torch==2.13.0"]
    assert first == [*environment, "pip install -e .", 'nanovllm generate "What is paged attention?"']
    assert second == [*environment, "pip install -e '.[dev]'", "pytest -q"]


def test_both_readmes_have_the_same_structure():
    english, chinese = (readme.read_text(encoding="utf-8") for readme in READMES)

    def structure(text: str) -> list[str]:
        """Headings by level, blocks without comments, tables by their first column, number of list items."""
        body = prose(text).replace(".zh-CN.md)", ".md)")  # a page may have a Chinese sister
        return [
            *re.findall(r"^(#+) ", body, re.MULTILINE),
            *(info + re.sub(r"#.*", "", block) for info, block in fences(text)),
            *re.findall(r"^\| (`[^|]*) \| (\d+)", body, re.MULTILINE),
            str(len(re.findall(r"^- ", body, re.MULTILINE))),
            *sorted(set(re.findall(r"\]\(([^)]+)\)", body)) - {"README.md"}),
        ]

    assert structure(english) == structure(chinese)


# -- tables -----------------------------------------------------------------------------------------------------------


def default_of(field: dataclasses.Field[object]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def shown(value: object) -> str:
    return f"`{value}`" if "RequestOutputKind" in str(value) else f"`{value!r}`"


def test_sampling_parameters_are_all_described_with_their_defaults():
    rows = table("docs/api.md", "SamplingParams")
    fields = dataclasses.fields(SamplingParams)
    assert [row[:2] for row in rows] == [[f"`{field.name}`", shown(default_of(field))] for field in fields]
    assert {row[0].strip("`") for row in rows if row[-1].startswith("not yet")} == set(UNSUPPORTED_PARAMETERS)


def test_engine_arguments_are_all_described_with_their_defaults():
    described = {
        name: row[1] for row in table("docs/api.md", "Engine arguments") for name in re.findall(r"`(\w+)`", row[0])
    }
    assert described == {field.name: shown(default_of(field)) for field in dataclasses.fields(EngineArgs)}


def test_commands_and_environment_variables_are_all_described():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## ([a-z-]+)$", page, re.MULTILINE) == list(COMMANDS)
    read = {
        variable
        for file in (ROOT / "nanovllm").rglob("*.py")
        for variable in re.findall(r"\b(?:NANO)?VLLM_[A-Z_]*[A-Z]\b", file.read_text(encoding="utf-8"))
    }
    described = " ".join(row[0] for row in table("docs/cli.md", "Environment variables"))
    assert set(re.findall(r"(?:NANO)?VLLM_\w+", described)) == read


def test_architectures_are_all_described():
    assert {row[0].strip("`") for row in table("docs/models.md", "Families")} == set(ARCHITECTURES)


def test_every_feature_that_works_names_what_shows_it():
    for line in (ROOT / "docs" / "features.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and not line.startswith(("| feature", "|---")):
            _, state, proof = (cell.strip() for cell in line.strip("|").split(" | "))
            assert state.startswith(("work", "planned")) and state.startswith("work") == bool(proof), line


@pytest.mark.parametrize("page", ["README.md", "docs/learning-path.md"])
def test_line_counts_of_the_learning_path_are_about_right(page: str):
    rows = re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert rows
    for file, lines in rows:
        actual = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(actual - int(lines)) <= 15 + actual // 8, f"{file} has {actual} lines"
