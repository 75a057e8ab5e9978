"""Lines with both axes logarithmic, as SVG."""

from __future__ import annotations

import math

COLORS = ("#1f6f8b", "#b5532a", "#4b7f3a", "#7a4fa0", "#a88400", "#555555", "#c2407e")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 380, 60, 120, 30, 50


def log_plot(lines: dict[str, list[tuple[float, float]]], title: str, x_title: str) -> str:
    """Lines by name, each of points (x, y) above 0; an x that occurs has its number below."""
    points = [point for line in lines.values() for point in line]
    (least_x, most_x), (least_y, most_y) = (
        (math.log10(min(values)), math.log10(max(values))) for values in zip(*points, strict=True)
    )
    lowest, highest = math.floor(least_y), math.ceil(most_y)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - least_x) / (most_x - least_x or 1)
        up = (math.log10(y) - lowest) / (highest - lowest or 1)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * across, 1), round(
            HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * up, 1
        )

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">']
    parts += [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/><g font-size="12" fill="#333">']
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text x="{place(x, 1)[0]}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:,g}</text>')
    for power in range(lowest, highest + 1):
        y = place(points[0][0], 10.0**power)[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="20" y="{y + 4}">{10.0**power:,g}</text>')
    parts.append(f'<text x="{LEFT}" y="18">{title}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{x_title}</text>')
    ends: list[float] = []
    for number, (name, line) in enumerate(sorted(lines.items(), key=lambda item: -item[1][-1][1])):
        color = COLORS[number % len(COLORS)]
        steps = (f"{'L' if at else 'M'}{place(*point)[0]} {place(*point)[1]}" for at, point in enumerate(line))
        parts.append(f'<path d="{" ".join(steps)}" fill="none" stroke="{color}" stroke-width="2"/>')
        x, y = place(*line[-1])
        ends.append(max(y, ends[-1] + 14) if ends else y)  # names do not lie on each other
        parts.append(f'<text x="{x + 6}" y="{ends[-1] + 4}" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</g></svg>", ""])
