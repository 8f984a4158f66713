"""Figures against their targets, as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.timing import Spread

COLUMNS = ("benchmark", "figure", "measured", "rounds", "target", "verdict")


@dataclass(frozen=True)
class Target:
    """A bound for a figure."""

    bound: float
    at_most: bool

    def verdict(self, value: float) -> str:
        """`met`, or by what share of the bound it is missed."""
        if value <= self.bound if self.at_most else value >= self.bound:
            return "met"
        return f"missed by {abs(value / self.bound - 1):.1%}"


def at_most(bound: float) -> Target:
    return Target(bound, at_most=True)


def at_least(bound: float) -> Target:
    return Target(bound, at_most=False)


@dataclass(frozen=True)
class Figure:
    """A measured number with its spread over the rounds."""

    benchmark: str
    name: str
    spread: Spread
    unit: str = ""
    target: Target | None = None

    @classmethod
    def single(cls, benchmark: str, name: str, value: float, unit: str = "", target: Target | None = None) -> Figure:
        """A figure from one measurement."""
        return cls(benchmark, name, Spread(value, value, value), unit, target)

    def row(self) -> dict[str, str]:
        """The cells of `COLUMNS`."""
        value, low, high = self.spread.median, self.spread.low, self.spread.high
        sign = "≤" if self.target and self.target.at_most else "≥"
        return {
            "benchmark": self.benchmark,
            "figure": self.name,
            "measured": f"{_number(value)} {self.unit}".strip(),
            "rounds": "" if low == high else f"{_number(low)} .. {_number(high)}",
            "target": f"{sign} {_number(self.target.bound)} {self.unit}".strip() if self.target else "",
            "verdict": self.target.verdict(value) if self.target else "",
        }


def _number(value: float) -> str:
    """Three significant digits, and no decimals from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def print_table(figures: Sequence[Figure], machine: Mapping[str, str]) -> None:
    """Prints the machine and the table; without a terminal in its full width."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 200
    for name, value in machine.items():
        console.print(f"{name:12} {value}", highlight=False, markup=False)
    table = Table(*COLUMNS)
    for figure in figures:
        row = figure.row()
        style = "red" if row["verdict"].startswith("missed") else None
        table.add_row(*row.values(), style=style, end_section=False)
    console.print(table)
