"""What a study found, for people: one HTML page, a table for the terminal, verdicts in words, single figures."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.report.html import write as write
    from downriver.report.text import table as table
    from downriver.report.text import verdict_lines as verdict_lines

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "table": "downriver.report.text:table",
        "verdict_lines": "downriver.report.text:verdict_lines",
        "write": "downriver.report.html:write",
    },
)
