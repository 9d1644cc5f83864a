"""`report.html`: one page with everything in it, safe whatever the files say."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from result_files import make_result, write_comparison, write_result
from rich.console import Console

from gradsync.report import make_report
from gradsync.report.comparison import Comparison
from gradsync.report.document import NO_BREAK, Document, document_of
from gradsync.report.results import load_results

ODD_NAMES = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "--> ]]> </style></svg>",
    "Ünïcode 日本語 🚀",
    "a/b\\c 'd' \"e\"",
    "&lt;b&gt; &amp; [bold]",
    "$x_{1}",
    "_hidden",
    'id="x" url(#y) #ffffff',
)
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Elements and texts of a page; every element must be closed by its own end."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.replace(NO_BREAK, " "))

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def ids(self) -> list[str]:
        return [id_ for _, attributes in self.elements if (id_ := attributes.get("id"))]


def make(folder: Path) -> Page:
    paths = make_report(folder, Console(file=StringIO(), width=100))
    return Page(paths.page.read_text(encoding="utf-8"))


def document(folder: Path) -> Document:
    return document_of(Comparison.of(folder, load_results(folder)))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """A comparison whose every text is hostile."""
    folder = tmp_path_factory.mktemp("x") / "a <b> & 'c'"
    for index, name in enumerate(ODD_NAMES):
        result = make_result(f"odd{index}", method=name, data=name, loss_seed=index)
        result["environment"] |= {f"key{name}": name}
        result["config"]["model"] |= {name: name}
        write_result(folder, result)
    (folder / "comparison.json").write_text(json.dumps({"strategies": ["<i>"], "command": "gradsync <b> \"x  y\" 'z'"}))
    (folder / "failed_x.json").write_text(json.dumps({"method": "<u>", "error": "</ul><script>"}))
    return folder, make(folder)


def test_the_page_says_what_the_text_says(tmp_path: Path) -> None:
    page, content = make(write_comparison(tmp_path, repeats=2)), document(tmp_path)
    for section in (content.summary, *content.sections):
        assert section.title in page.texts
        assert all(line in page.texts for line in (*section.lines, *section.commands))
    for table in content.tables:
        assert all(part in page.texts for row in table.rows for cell in row for part in cell.split("\n"))
        assert all(note in page.texts for note in table.notes)
    assert sum(tag == "figure" for tag, _ in page.elements) == 5


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = make(write_comparison(tmp_path))
    text = (tmp_path / "report.html").read_text()
    assert "http" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not {tag for tag, _ in page.elements} & {"script", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(key)
            assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,")


def test_ids_are_unique_and_every_reference_leads_to_one(tmp_path: Path) -> None:
    page = make(write_comparison(tmp_path, repeats=2))
    ids = page.ids()
    assert len(ids) == len(set(ids))
    used = [value for _, a in page.elements for value in a.values() if value]
    references = [name for value in used for name in re.findall(r"url\(#([^)]*)\)|^#([\w-]+)$", value)]
    names = {a or b for a, b in references} - {value[1:] for value in used if re.fullmatch(r"#[0-9a-fA-F]{6}", value)}
    assert names
    assert names <= set(ids)


def test_odd_names_are_texts_and_nothing_else(odd: tuple[Path, Page]) -> None:
    folder, page = odd
    plain = make_elements(folder.parent / "plain")
    assert {tag for tag, _ in page.elements} <= plain
    handlers = [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert not handlers
    assert all(name in page.text for name in ODD_NAMES)
    assert "gradsync <b> \"x  y\" 'z'" in page.texts
    assert str(folder) in page.text
    assert len(page.ids()) == len(set(page.ids()))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
def test_a_browser_runs_nothing_in_it(tmp_path: Path) -> None:
    """Neither a script in a name nor one that an element's end lets out."""
    script = "<script>document.title='taken over'</script><img src=x onerror=\"document.title='taken over'\">"
    names = (script, f"</style>{script}", f"</title>{script}", f"</svg>{script}", f"-->{script}", f'">{script}')
    for index, name in enumerate(names):
        write_result(tmp_path, make_result(f"odd{index}", method=name))
    make(tmp_path)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["chromium", *flags, "--dump-dom", (tmp_path / "report.html").as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>Comparison of 6 methods" in seen
    assert "<title>taken over" not in seen
    assert seen.count("<figure>") == 5


def make_elements(folder: Path) -> set[str]:
    return {tag for tag, _ in make(write_comparison(folder)).elements}


def test_names_are_whole_in_the_pictures_too(odd: tuple[Path, Page]) -> None:
    folder, _ = odd
    pictures = re.findall(r"<svg role.*?</svg>|<svg [^>]*viewBox.*?</svg>", (folder / "report.html").read_text(), re.S)
    drawn = [p for p in pictures if "<text" in p]
    assert len(drawn) == 5
    for picture in drawn:
        texts = [element.text for element in ElementTree.fromstring(picture).iter("text")]
        assert any("日本語" in (text or "") for text in texts)


def test_colors_of_the_page_are_in_its_style_and_strategies_keep_theirs(tmp_path: Path) -> None:
    make(write_comparison(tmp_path))
    text = (tmp_path / "report.html").read_text()
    style, body = text.split("</style>")
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", style))
    assert not set(re.findall(r"#(?:ffffff|000000|555555|dddddd)", body))
    for color in ("#0072b2", "#e69f00", "#009e73"):
        assert color in body
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    make(write_comparison(tmp_path))
    first = (tmp_path / "report.html").read_bytes()
    make(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_table_row_has_the_mark_of_its_strategy(tmp_path: Path) -> None:
    page = make(write_comparison(tmp_path))
    swatches = [a for tag, a in page.elements if tag == "svg" and a.get("class") == "swatch"]
    assert len(swatches) == 6


def test_the_command_that_made_it_is_there_or_why_not(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    assert "How the comparison was started is not known" in make(tmp_path).text
    command = "gradsync compare --demo --output 'some  where'"
    (tmp_path / "comparison.json").write_text(json.dumps({"strategies": [], "command": command}))
    page = make(tmp_path)
    assert command in page.texts
    assert "give it another --output" in page.text
    (tmp_path / "comparison.json").write_text('{"command": 3}')
    assert "names no command" in make(tmp_path).text
