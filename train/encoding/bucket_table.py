"""Table of aspect-ratio buckets, printed before encoding starts."""

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data.buckets import Buckets, Size
from data.cache.latents import BucketRow, LatentPlan
from flux2.utils.text import printable
from train.utils.text import many

MOST_ROWS = 20
MOST_SHAPES = 3  # of references, in a line


def bucket_table(plan: LatentPlan, title: str = "Buckets") -> Table:
    """Return a table with a row per bucket, the fullest first; beyond `MOST_ROWS` one row sums up the rest."""
    table = Table(title=title, box=SIMPLE, title_justify="left")
    table.add_column("pixels")
    for name in ("images", "cropped on average", "at most"):
        table.add_column(name, justify="right")
    has_references = any(shape for row in plan.table.values() for shape in row.references)
    table.add_column("references" if has_references else "")
    rows = sorted(plan.table.items(), key=lambda item: (-item[1].pictures, item[0]))
    shown = rows if len(rows) <= MOST_ROWS else rows[: MOST_ROWS - 1]
    for size, row in shown:
        notes = [shapes(row.references)] if has_references else []
        notes += ["fills no bucket of buckets.resolution"] if row.own else []
        table.add_row(f"{size[0]} x {size[1]}", *cells(row), "; ".join(notes))
    if rest := rows[len(shown) :]:
        table.add_row(f"{len(rest)} more", *cells(*(row for _, row in rest)), "")
    if len(rows) > 1:
        table.add_section()
        table.add_row("all", *cells(*plan.table.values()), "")
    return table


def cells(*rows: BucketRow) -> tuple[str, str, str]:
    """Return the cells of several buckets together: images, and how much of them is cropped on average and at most."""
    count, lost = sum(row.pictures for row in rows), sum(row.lost for row in rows)
    return str(count), f"{100 * lost / count:.1f} %", f"{100 * max(row.most for row in rows):.1f} %"


def shapes(references: Counter[tuple[Size, ...]]) -> str:
    """Return the sizes of the references of a bucket's samples, the most frequent first."""
    named = [
        f"{' + '.join(f'{width} x {height}' for width, height in sizes) or 'none'} ({count})"
        for sizes, count in references.most_common(MOST_SHAPES)
    ]
    rest = len(references) - len(named)
    return ", ".join([*named, f"{rest} other sizes"] if rest else named)


def show_buckets(plan: LatentPlan, buckets: Buckets, left_out: Sequence[object], title: str = "Buckets") -> None:
    """Print the table, the cached variants, and the skipped samples with reasons."""
    console = Console(width=max(100, Console().width), highlight=False, markup=False)
    console.print(bucket_table(plan, title))
    with_references = sum(bool(entry.reference_sizes) for entry in plan.entries)
    console.print(f"samples with references: {with_references or 'none'} of {len(plan.entries)}")
    variants = max(buckets.random_crops, 1) * (2 if buckets.flip else 1)
    if variants > 1 or buckets.color or buckets.rotation:
        crops = many(buckets.random_crops, "crop") if buckets.random_crops else "the center crop"
        changes = (
            (buckets.color, f"with colors changed by up to {buckets.color:.0%}"),
            (buckets.rotation, f"turned by up to {buckets.rotation:g} degrees"),
            (buckets.flip, "also mirrored"),
        )
        console.print("cached for each image: " + ", ".join([crops, *(text for used, text in changes if used)]))
    if plan.middles:
        console.print(f"center crop because of their references: {many(plan.middles, 'sample')}")
    for bad in left_out[:MOST_ROWS]:
        console.print(printable(f"skipped: {bad}"), soft_wrap=True)
    if len(left_out) > MOST_ROWS:
        console.print(f"skipped: {len(left_out) - MOST_ROWS} more")
