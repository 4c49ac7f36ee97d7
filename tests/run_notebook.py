"""Run a notebook's code cells as one program: python run_notebook.py NOTEBOOK PICTURES.

A cell's last expression is shown as Jupyter shows it: a picture becomes a PNG file in the folder
PICTURES, as do the cell's figures; anything else is printed. The first error ends the program.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from PIL import Image


def code_cells(notebook: dict[str, Any]) -> list[str]:
    """Return the text of a notebook's code cells, in order."""
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def run(notebook: Path, pictures: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(code_cells(json.loads(notebook.read_text("utf-8"))), 1):
        where = f"{notebook.name}, code cell {number}"
        body = ast.parse(text, where)
        last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, where, "exec"), names)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), where, "eval"), names)
            if isinstance(shown, Image.Image):
                shown.save(pictures / f"{number:02}.png")
            elif shown is not None:
                print(shown)
        for figure in plt.get_fignums():
            plt.figure(figure).savefig(pictures / f"{number:02}_{figure}.png")
        plt.close("all")


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
