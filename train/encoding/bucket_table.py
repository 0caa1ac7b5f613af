"""The table of buckets that is printed before anything is encoded: what becomes of the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data.buckets import Buckets
from data.cache.latents import BucketRow, LatentPlan
from train.utils.text import many

MOST_ROWS = 20


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def bucket_table(plan: LatentPlan, title: str = "Buckets") -> Table:
    """A line a bucket, those with the most pictures first; beyond `MOST_ROWS` the rest in one line."""
    table = Table(title=title, box=SIMPLE, title_justify="left")
    table.add_column("pixels")
    for name in ("pictures", "cut off on average", "at most"):
        table.add_column(name, justify="right")
    table.add_column("")
    rows = sorted(plan.table.items(), key=lambda item: (-item[1].pictures, item[0]))
    shown = rows if len(rows) <= MOST_ROWS else rows[: MOST_ROWS - 1]
    for size, row in shown:
        note = "fills no bucket of buckets.resolution" if row.own else ""
        table.add_row(f"{size[0]} x {size[1]}", *numbers(row), note)
    if rest := rows[len(shown) :]:
        table.add_row(f"{len(rest)} more", *numbers(together([row for _, row in rest])), "")
    if len(rows) > 1:
        table.add_section()
        table.add_row("all", *numbers(together(list(plan.table.values()))), "")
    return table


def together(rows: list[BucketRow]) -> BucketRow:
    return BucketRow(sum(row.pictures for row in rows), sum(row.lost for row in rows), max(row.most for row in rows))


def numbers(row: BucketRow) -> tuple[str, str, str]:
    return str(row.pictures), percent(row.lost / row.pictures), percent(row.most)


def show_buckets(plan: LatentPlan, buckets: Buckets, left_out: Sequence[object], title: str = "Buckets") -> None:
    """Print the table, which variants are cached, and what was left out and why."""
    console = Console(width=max(100, Console().width), highlight=False, markup=False)
    console.print(bucket_table(plan, title))
    variants = max(buckets.random_crops, 1) * (2 if buckets.flip else 1)
    if variants > 1:
        crops = f"{buckets.random_crops} crops" if buckets.random_crops else "the middle"
        console.print(f"cached of each picture: {crops}{', each mirrored too' if buckets.flip else ''}")
    if plan.middles:
        console.print(f"cut in the middle, because of their references: {many(plan.middles, 'sample')}")
    for number, bad in enumerate(left_out):
        if number == MOST_ROWS:
            console.print(f"left out: {len(left_out) - number} more")
            break
        console.print(f"left out: {bad}", soft_wrap=True)
