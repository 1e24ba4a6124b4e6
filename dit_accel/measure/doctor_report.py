"""The findings of `dit-accel doctor`: shown as a table, and written for bug reports without the names of users and machines."""

import getpass
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dit_accel import files

FORMAT = 1
RIGHT, WRONG, UNCHECKED = "right", "wrong", "not checked"
_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'\",;()\[\]<>]+[/\\])+([^\s/\\:'\",;()\[\]<>]*)")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it is right, a sentence (of what is wrong: with what to do), and its numbers."""

    name: str
    state: str
    says: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Versions, and the checks in the order in which they were made."""

    versions: dict[str, str]
    checks: list[Check] = field(default_factory=list)

    def add(self, name: str, state: str, says: str, **numbers: Any) -> None:
        self.checks.append(Check(name, state, says, numbers))

    @property
    def faults(self) -> list[Check]:
        return [check for check in self.checks if check.state == WRONG]

    def as_json(self) -> dict[str, Any]:
        """Everything, with paths cut to their last part and the user's and the machine's name left out."""
        content = {
            "format": FORMAT,
            "right": not self.faults,
            "versions": self.versions,
            "checks": [asdict(check) for check in self.checks],
        }
        return publishable(content)

    def write(self, path: Path) -> None:
        """Write to a temporary name next to `path`, then rename. Raises WriteError."""
        files.write_json(path, self.as_json())

    def show(self, shown: Console) -> None:
        """Print versions, a line for each check, and the faults in full once more."""
        versions = Table.grid("", "", padding=(0, 2))
        for name, version in self.versions.items():
            versions.add_row(Text(name), Text(version))
        shown.print(versions)
        table = Table("check", "", "what was found")
        for check in self.checks:
            table.add_row(Text(check.name), Text(check.state), Text(check.says))
        shown.print(table)
        count = len(self.faults)
        shown.print("all that can be checked here is right" if not count else f"{count} fault{'s' if count > 1 else ''}:")
        for check in self.faults:
            shown.print(Text(f"{check.name}: {check.says}"))


def publishable(content: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready content for a bug report: paths are cut to their last part, the user's and the machine's name left out."""
    cleaned: dict[str, Any] = _cleaned(content, list(_private()))
    return cleaned


def _private() -> Iterator[tuple[re.Pattern[str], str]]:
    """Texts that a report must not contain, and their replacements: the home folder first, because names are parts of it."""
    home = str(Path.home())
    if len(home) > 1:
        yield re.compile(re.escape(home)), "~"
    yield _PATH, r"…/\1"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        user = ""
    host = platform.node()
    for name, place in ((user, "<user>"), (host, "<host>"), (host.split(".")[0], "<host>")):
        if name:
            yield re.compile(rf"(?<!\w){re.escape(name)}(?!\w)"), place


def _cleaned(value: Any, private: list[tuple[re.Pattern[str], str]]) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(item, private) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item, private) for item in value]
    if isinstance(value, str):
        for pattern, place in private:
            value = pattern.sub(place, value)
    return value
