"""Writes architecture.svg beside this file: one training step, and the folders in the order in which they may import.

The order is read from tests/contract/test_layers.py, which enforces it. Run: python recipes/pictures/architecture.py
"""

from __future__ import annotations

import ast
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
ORDER_FILE = HERE.parents[1] / "tests" / "contract" / "test_layers.py"
WIDTH = 960
STEP = (
    ("prompt", "prompts/"),
    ("rollout", "rollout/, policies/"),
    ("reward", "rewards/"),
    ("advantages", "TRL"),
    ("critical tokens", "objective/selection/"),
    ("weight", "objective/weighting"),
    ("loss", "TRL, objective/"),
)
NOTES = {
    "cli": "commands",
    "bench": "speed beside a peer",
    "studies": "arms and seeds",
    "memory": "on paper",
    "analysis": "figures",
    "evaluation": "benchmarks",
    "runs": "a recipe becomes a run",
    "trainer": "one training step, a chain of classes on trl.GRPOTrainer",
    "monitoring": "what one sees while it trains",
    "rewards": "load, check, run, serve",
    "config": "one dataclass per trainer",
    "rollout": "guided sampling",
    "shapes": "a world to try it in",
    "policies": "one file per model family",
    "models": "what transformers lacks",
    "prompts": "sets and files",
    "objective": "the papers as pure functions of tensors",
    "trl_compat": "TRL's private names",
}


def levels() -> list[list[str]]:
    """Folders of each level, the highest first."""
    for node in ast.parse(ORDER_FILE.read_text()).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="ORDER")], value=value):
                return [level.split(", ") for level in str(ast.literal_eval(value)).split(" > ")]
    raise ValueError(f"{ORDER_FILE} assigns no ORDER")


def box(left: float, top: float, width: float, height: float, fill: str, edge: str) -> str:
    """A rectangle with round corners."""
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="6" ry="6" '
        f'fill="{fill}" stroke="{edge}" stroke-width="1"/>'
    )


def words(x: float, y: float, text: str, size: int = 13, fill: str = "#1f2933", bold: bool = False) -> str:
    """A line of text, centred at x."""
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle" fill="{fill}"{weight}>{escape(text)}</text>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head, to the right or downwards."""
    right = y1 == y2
    head = ((-7, -4), (-7, 4)) if right else ((-4, -7), (4, -7))
    corners = " ".join(f"{x2 + dx:g},{y2 + dy:g}" for dx, dy in ((0, 0), *head))
    line = f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="#52606d" stroke-width="1.5"/>'
    return f'{line}<polygon points="{corners}" fill="#52606d"/>'


def training_step(top: float) -> list[str]:
    """The straight line from a prompt to the loss."""
    gap = 22
    width = (WIDTH - 40 - gap * (len(STEP) - 1)) / len(STEP)
    parts = [words(WIDTH / 2, top + 18, "One training step", 16, bold=True)]
    for index, (name, where) in enumerate(STEP):
        left = 20 + index * (width + gap)
        parts += [
            box(left, top + 34, width, 38, "#dbeafe", "#3b6fb6"),
            words(left + width / 2, top + 58, name, bold=True),
        ]
        parts.append(words(left + width / 2, top + 90, where, 11, "#52606d"))
        if index:
            parts.append(arrow(left - gap + 3, top + 53, left - 3, top + 53))
    return parts


def folders(top: float) -> list[str]:
    """A row per level, with a box per folder."""
    row, gap = 44, 10
    parts = [words(WIDTH / 2, top + 18, "Folders of gcpo_trl: imports go down only", 16, bold=True)]
    everything = levels()
    for number, level in enumerate(everything):
        y = top + 32 + number * row
        width = (WIDTH - 90 - gap * (len(level) - 1)) / len(level)
        for index, name in enumerate(level):
            left = 70 + index * (width + gap)
            note = NOTES.get(name, "")
            parts.append(box(left, y, width, 36, "#f1f5f9" if name != "objective" else "#dbeafe", "#9aa5b1"))
            parts.append(words(left + width / 2, y + (16 if note else 23), name, bold=True))
            if note:
                parts.append(words(left + width / 2, y + 30, note, 11, "#52606d"))
    bottom = top + 32 + len(everything) * row
    parts.append(arrow(40, top + 34, 40, bottom - 10))
    parts += [
        box(70, bottom + 12, WIDTH - 90, 36, "#ffffff", "#9aa5b1"),
        words(70 + (WIDTH - 90) / 2, bottom + 28, "reward_funcs", bold=True),
    ]
    parts.append(
        words(70 + (WIDTH - 90) / 2, bottom + 42, "one file per reward; imports nothing of gcpo_trl", 11, "#52606d")
    )
    return parts


def picture() -> str:
    """The whole SVG."""
    top = 132
    height = top + 32 + 44 * len(levels()) + 62
    parts = [f'<rect x="0" y="0" width="{WIDTH}" height="{height}" fill="#ffffff"/>', *training_step(8), *folders(top)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return "\n".join([f'{head} font-family="Helvetica, Arial, sans-serif">', *parts, "</svg>\n"])


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(picture())
