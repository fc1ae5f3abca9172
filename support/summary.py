"""What a training understood of its data: told at its start, and by --dry-run.

train.main() calls tell() before any weight is read.
"""
import argparse
from collections import Counter

from support import layouts
from support.commands import is_first, workers
from support.pictures import LONGEST
from support.texts import unread
from support.words import counted, say, some_of
from text_encoder import T5Tokenizer

SHOWN = 3                                                # of what there is many of


def about(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def commonest(found: Counter[str]) -> str:
    """The first of them, with how often each is there, and how many others there are."""
    told = [f"{name[:60]} ({number:,})" for name, number in found.most_common(SHOWN)]
    if len(found) > SHOWN:
        told.append(f"{len(found) - SHOWN:,} more")
    return ", ".join(told)


def rows_of(source: object) -> list[str]:
    """Lines about a folder's rows: what they are given, their sizes, what is not used."""
    rows = source.checked_rows
    given = Counter(counted(row.natives, "reference") + (
        f" and {counted(len(row.paths) - 1 - row.natives, 'condition')}"
        if len(row.paths) - 1 > row.natives else "") for row in rows)
    sizes = Counter(f"{width}x{height}" for width, height in (row.sizes[0] for row in rows))
    pressed = Counter(f"{w}x{h} to {width}x{height}" for row in rows for (w, h), (width, height)
                      in zip(row.own_sizes, row.sizes) if not 0.9 < w * height / h / width < 1.1)
    lines = [f"rows with {commonest(given)}", f"targets of {commonest(sizes)}"]
    if pressed:
        lines.append(f"pictures pressed into another shape: {commonest(pressed)}")
    if source.unread:
        lines.append(f"left unread, entries without a known name: {commonest(source.unread)}")
    return lines + [f"left out: {line}" for line in source.left_out()]


def understood(source: object) -> list[str]:
    """Lines about a source that is not trained on: a folder's rows, a public set's files."""
    if hasattr(source, "checked_rows"):
        return rows_of(source)
    if not hasattr(source, "contents"):
        return []
    files = list(dict.fromkeys(file.name for file, *_ in source.groups))
    told = f"read from {some_of(files)}"
    if source.groups[0][0].is_file():                    # else COCO's own folder of pictures
        told += ("; of a folder those called dev, test or val are left out, unless one is named "
                 "itself")
    return [told]


def rows_in(source: object) -> int:
    """How many rows a folder has, or a public set."""
    return len(source.checked_rows) if hasattr(source, "checked_rows") else sum(source.sizes)


def per_batch(source: object, size: int) -> float:
    """How many of its rows a batch of `size` has on average."""
    if hasattr(source, "checked_rows"):                  # a folder: a batch is of one group
        groups = [len(rows) for rows in source.groups.values()]
        return sum(n * min(size, n) for n in groups) / sum(groups)
    counts = source.conditions                           # a public set: n conditions, size // n
    return sum(max(1, size // n) for n in counts) / len(counts)


def tell(args: argparse.Namespace, sources: list[tuple[object, float]],
         held_out: object) -> None:
    """Print what each source holds and how long a pass over it takes; one process speaks for all.

    sources: with their weights; held_out: a validation.HeldOut.
    Raises: FileNotFoundError, ValueError for a broken tokenizer.
    """
    if not is_first():
        return
    tokens = T5Tokenizer(layouts.model_paths(
        args.model, args.tokenizers, vae=args.vae, text_encoder=args.text_encoder,
        text_encoder_2=args.text_encoder_2)["tokenizer_2"])
    if args.longest != LONGEST:
        say(f"pictures: at most {args.longest} on the longer side, by --longest")
    batches = args.accumulate * workers()                # in each step
    for name, (source, weight) in zip(args.data, sources, strict=True):
        if not hasattr(source, "contents"):
            say(f"{name}: samples without end")
            continue
        rows, mean = rows_in(source), per_batch(source, args.batch_size)
        steps = rows / mean / batches * sum(w for _, w in sources) / weight
        passes = "" if args.steps is None else (
            f"; {counted(args.steps, 'step')}: {about(args.steps / steps)} "
            f"{'pass' if about(args.steps / steps) == '1' else 'passes'}")
        say(f"{name}: {counted(rows, 'row')}; a pass over them takes about "
            f"{counted(max(1, round(steps)), 'step')}, {about(mean)} in a batch{passes}")
        if hasattr(source, "checked_rows"):
            instructions = (row.instruction for row in source.checked_rows)
            for line in rows_of(source) + unread(instructions, tokens):
                say(f"  {line}")
    for line in held_out.about(tokens, [source for source, _ in sources]):
        say(line)
