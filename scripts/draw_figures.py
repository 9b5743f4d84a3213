#!/usr/bin/env python3
"""Draws docs/*.svg from the tables of docs/figures.md, so that a chart shows what its table says:

    python3 scripts/draw_figures.py           # writes them
    python3 scripts/draw_figures.py --check   # fails if one is not what the tables say

GPU, date and commit in the titles come from the same document. No packages are needed.
"""
import math
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
GPU = "NVIDIA H200"
TB_PER_S, TFLOP_PER_S = 4.55, 989
WIDTH, HEIGHT = 900, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 50, 60
# The colours of Okabe and Ito, which can be told apart with any kind of colour vision.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]


def tables(text):
    """Every table as a list of rows of cells."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        yield [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]


def table(text, first_row):
    """The rows below the header of the table that has `first_row` as its first cell."""
    found = [t[2:] for t in tables(text) if t[2][0] == first_row]
    assert len(found) == 1, f"{len(found)} tables begin with '{first_row}'"
    return found[0]


def is_filled(rows):
    """Whether a table has its figures."""
    return not any(cell == "–" for row in rows for cell in row)


def measured(text, section):
    """Date and commit of a section, from the table of contents."""
    (row,) = [r for t in tables(text) for r in t if r[0].startswith(section)]
    return f"{row[1]}, commit {row[2]}"


class Svg:
    def __init__(self, title, x_label, y_label, x, y):
        """`x` and `y` map a value to 0..1."""
        self.x, self.y = x, y
        self.parts = []
        self.text(WIDTH / 2, 28, title, size=17)
        self.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label)
        self.text(18, (TOP + HEIGHT - BOTTOM) / 2, y_label, turn=True)

    def at(self, x, y):
        return (
            LEFT + self.x(x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - self.y(y) * (HEIGHT - TOP - BOTTOM),
        )

    def text(self, x, y, words, size=13, anchor="middle", turn=False):
        turned = f' transform="rotate(-90 {x:g} {y:g})"' if turn else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{turned}>{words}</text>'
        )

    def path(self, points, colour, width, opacity=1.0):
        d = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{width:g}" opacity="{opacity:g}"/>'
        )

    def dot(self, x, y, colour, filled, radius=4):
        fill = colour if filled else "none"
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
        )

    def grid(self, xs, ys, y_names=None):
        bottom, top = HEIGHT - BOTTOM, TOP
        for value, name in xs:
            x, _ = self.at(value, ys[0])
            self.path([(x, bottom), (x, top)], "#888888", 0.5, 0.5)
            self.text(x, bottom + 20, name)
        for value in ys:
            _, y = self.at(xs[0][0], value)
            self.path([(LEFT, y), (WIDTH - RIGHT, y)], "#888888", 0.5, 0.5)
            self.text(LEFT - 8, y + 4, f"{value:g}", anchor="end")

    def legend(self, entries, right, bottom):
        """Entries of (name, draw), the last at the bottom."""
        for i, (name, draw) in enumerate(entries):
            y = bottom - 20 * (len(entries) - 1 - i)
            draw(right - 190, y)
            self.text(right - 160, y + 4, name, anchor="start")

    def document(self):
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def attention(text):
    title, rows = "Flash attention forward", table(text, "D 128, ours")
    return by_length(f"{title}, bf16, {GPU}, {measured(text, '[attention]')}", rows, [512 << i for i in range(6)])


def backward(text):
    title, rows = "Flash attention backward", table(text, "D 128, ours, backward")
    if not is_filled(rows):
        return None
    lengths = [512, 1024, 2048, 4096, 16384]
    return by_length(f"{title}, bf16, {GPU}, {measured(text, '[attention, backward]')}", rows, lengths)


def by_length(title, rows, lengths):
    """Pairs of rows: ours, and cuDNN's before a comma."""
    svg = Svg(
        title,
        "length of the sequences (16384 tokens in all)",
        "TFLOP/s",
        lambda s: 0.03 + 0.94 * math.log2(s / 512) / 5,
        lambda t: t / 850,
    )
    svg.grid([(s, f"{s}") for s in lengths], range(0, 900, 100))
    entries = []
    for i, (ours, peers) in enumerate(zip(rows[::2], rows[1::2])):
        name, colour = ours[0].split(", ours")[0], COLOURS[i]
        cudnn = [float(cell.split(",")[0]) for cell in peers[1:]]
        for values, filled in ((list(map(float, ours[1:])), True), (cudnn, False)):
            points = [svg.at(s, t) for s, t in zip(lengths, values, strict=True)]
            svg.path(points, colour, 3 if filled else 1)
            for x, y in points:
                svg.dot(x, y, colour, filled, 3 if filled else 4)

        def draw(x, y, colour=colour):
            svg.path([(x, y), (x + 24, y)], colour, 3)

        entries.append((name, draw))
    for words, filled in (("kaio-candle", True), ("cuDNN 9.19", False)):

        def draw(x, y, filled=filled):
            svg.path([(x, y), (x + 24, y)], "#444444", 3 if filled else 1)
            svg.dot(x + 12, y, "#444444", filled, 3 if filled else 4)

        entries.append((words, draw))
    svg.legend(entries, WIDTH - RIGHT, HEIGHT - BOTTOM - 14)
    return svg.document()


def product(name):
    """M, N and K of a row's name."""
    if name.endswith("³"):
        return [int(name[:-1])] * 3
    return [int(part) for part in name.split("×")]


def microseconds(cell):
    return float(cell.replace(" ", ""))


def matmul(text):
    rows = table(text, "4096³")
    svg = Svg(
        f"Matmul, bf16, {GPU}, {measured(text, '[matmul]')}",
        "FLOP for each byte of operands and result",
        "TFLOP/s",
        lambda i: math.log10(i / 0.7) / math.log10(6000 / 0.7),
        lambda t: math.log10(t / 2) / math.log10(1400 / 2),
    )
    svg.grid([(10**i, f"{10**i}") for i in range(4)], [10, 100, 1000])
    knee = TFLOP_PER_S / TB_PER_S
    roof = [(0.7, 0.7 * TB_PER_S), (knee, TFLOP_PER_S), (6000, TFLOP_PER_S)]
    svg.path([svg.at(*point) for point in roof], "#444444", 2)
    for row in rows:
        m, n, k = product(row[0])
        flop, byte = 2 * m * n * k, 2 * (m * k + k * n + m * n)
        ours, *peers = [microseconds(row[column]) for column in (1, 3, 4, 5, 6)]
        for us, colour, filled in ((min(peers), COLOURS[1], False), (ours, COLOURS[0], True)):
            x, y = svg.at(flop / byte, flop / us / 1e6)
            svg.dot(x, y, colour, filled, 3 if filled else 6)
    entries = [
        (f"{TB_PER_S} TB/s, {TFLOP_PER_S} TFLOP/s", lambda x, y: svg.path([(x, y), (x + 24, y)], "#444444", 2)),
        ("kaio-candle", lambda x, y: svg.dot(x + 12, y, COLOURS[0], True, 3)),
        ("best peer", lambda x, y: svg.dot(x + 12, y, COLOURS[1], False, 6)),
    ]
    svg.legend(entries, WIDTH - RIGHT, HEIGHT - BOTTOM - 14)
    return svg.document()


def quantised(text):
    """Time by the rows of the activations: of each cell the first number is ours, the second that of 16 bits."""
    four, eight = table(text, "8192², f16"), table(text, "int8 codes")
    (int4,) = [row for row in four if row[0] == "8192²"]
    of_eight = {row[0]: row for row in eight}
    lines = [
        ("16 bits", [1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096], int4, 1),
        ("int4, groups of 128", [1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096], int4, 0),
        ("x rounded to int8, int8", [1, 16, 64, 256, 1024, 4096, 8192], of_eight["bf16 x, rounded to int8 inside"], 0),
        ("e4m3 codes", [1, 16, 64, 256, 1024, 4096, 8192], of_eight["e4m3 codes, scales of lines"], 0),
    ]
    svg = Svg(
        f"Products with a weight of 8192², bf16, {GPU}, {measured(text, '[quantised weights]')}",
        "rows of the activations",
        "microseconds",
        lambda m: 0.03 + 0.94 * math.log2(m) / 12,
        lambda us: math.log10(us / 10) / 2,
    )
    svg.grid([(4**i, f"{4**i}") for i in range(7)], [10, 20, 50, 100, 200, 500, 1000])
    entries = []
    for (name, rows, cells, number), colour in zip(lines, ["#444444", *COLOURS]):
        points = []
        for m, cell in zip(rows, cells[1:]):
            if cell and m <= 4096:
                points.append(svg.at(m, microseconds(cell.split("/")[number].strip())))
        svg.path(points, colour, 3)
        for x, y in points:
            svg.dot(x, y, colour, True, 3)

        def draw(x, y, colour=colour):
            svg.path([(x, y), (x + 24, y)], colour, 3)

        entries.append((name, draw))
    svg.legend(entries, WIDTH - RIGHT, HEIGHT - BOTTOM - 14)
    return svg.document()


def main():
    text = (DOCS / "figures.md").read_text(encoding="utf-8")
    stale = []
    charts = {
        "attention-h200.svg": attention,
        "attention-backward-h200.svg": backward,
        "matmul-h200.svg": matmul,
        "quantised-h200.svg": quantised,
    }
    for name, draw in charts.items():
        path, drawn = DOCS / name, draw(text)
        if drawn is None:
            print(f"{name}: its table has no figures yet")
            continue
        if "--check" not in sys.argv[1:]:
            path.write_text(drawn, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != drawn:
            stale.append(name)
    if stale:
        sys.exit(f"{', '.join(stale)}: not what docs/figures.md says; run scripts/draw_figures.py")


main()
