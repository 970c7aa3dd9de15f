"""The commands that README, docs, configs and scripts show to people."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "ds_configs", "benchmarks")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))), ROOT / "CONTRIBUTING.md"]
SCRIPT = re.compile(r"\b(launch|tools|benchmarks)/\w+\.py\b")


@dataclass(frozen=True)
class Command:
    text: str
    """As it is printed, on one line, without its comment."""
    where: str
    """FILE:LINE."""
    comment: str = ""

    @property
    def script(self) -> str | None:
        found = SCRIPT.search(self.text)
        return found and found[0]

    @property
    def arguments(self) -> list[str]:
        """What the script is given; of a pipe, up to its end."""
        words = shlex.split(re.sub(r"\$'((?:[^'\\]|\\.)*)'", lambda m: shlex.quote(m[1].encode().decode("unicode_escape")), self.text))
        after = words[next(i for i, word in enumerate(words) if SCRIPT.search(word)) + 1 :]
        return after[: next((i for i, word in enumerate(after) if word in ("|", ">", "&", "&&", ";", "|&")), len(after))]


def blocks() -> list[Command]:
    """Every command of every ```bash block, in the order of a reader."""
    commands = []
    for page in PAGES:
        is_open, begun = False, None
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            if line.lstrip().startswith("```"):
                is_open = not is_open and line.strip() == "```bash"
                continue
            if not is_open:
                continue
            text, where = (begun.text + " ", begun.where) if begun else ("", f"{page.relative_to(ROOT)}:{number}")
            part, comment = re.fullmatch(r"(.*?)(?:(?:^|\s)#\s(.*))?", line).groups()
            text += part.strip()
            begun = Command(text[:-1].strip(), where) if text.endswith("\\") else None
            if text and not begun:
                commands.append(Command(text, where, comment or ""))
    return commands


def mentions() -> list[Command]:
    """Commands in running text, in heads of configs and in docstrings of scripts."""
    commands = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for code in re.finditer(r"`((?:python|torchrun|deepspeed|mpirun)\s[^`]+)`", text):
            where = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, code.start()) + 1}"
            commands.append(Command(" ".join(code[1].split()), where))
    lines_of = [(path, r"^#\s+(.*)") for path in (ROOT / "configs").glob("*.yaml")]
    lines_of += [(path, r"^\s\s+(.*)") for folder in ("launch", "tools", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    for path, pattern in lines_of:
        text = path.read_text(encoding="utf-8")
        head = text if path.suffix == ".yaml" else text.split('"""')[1]
        for number, line in enumerate(head.splitlines(), 1):
            found = re.match(pattern, line)
            if found and re.match(r"(\w+=\S+ )*(python|torchrun|deepspeed|mpirun) ", found[1]):
                commands.append(Command(re.sub(r"\s+#\s.*$|\s\s+.*$", "", found[1]).strip(), f"{path.relative_to(ROOT)}:{number}"))
    return [c for c in commands if c.script and not re.search(r"…|\.\.\.|\bN\b", c.text)]  # no stand-ins for numbers
