"""The demo's page: pictures, loss, and what the scene check says of each picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from urae.miniature.check import SceneReport, check_scene
from urae.miniature.grammar import parse_caption

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22242a; max-width: 1080px; margin: 40px auto;
       padding: 0 20px; }
img { max-width: 100%; } h1 { font-size: 26px; } h2 { font-size: 19px; margin-top: 36px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 12px 6px 0;
         border-bottom: 1px solid #e2e4e8; vertical-align: top; } .no { color: #b3261e; }
.yes { color: #1d7a3e; } code { background: #f3f4f6; padding: 2px 5px; border-radius: 4px; }
"""


def write_page(
    path: Path,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Image.Image]],
    improvement: str,
    steps: int,
) -> None:
    """Write `index.html` beside the demo's pictures.

    Args:
        path: The file.
        prompts: One a row.
        columns: Pictures of each prompt, by how they were made.
        improvement: What the held-out loss did.
        steps: That the LoRA was trained for.
    """
    head = "".join(f"<th>{escape(label)}</th>" for label in columns)
    rows = "".join(
        f"<tr><td>{escape(prompt)}</td>"
        + "".join(f"<td>{_describe(pictures[n], prompt)}</td>" for pictures in columns.values())
        + "</tr>"
        for n, prompt in enumerate(prompts)
    )
    path.write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>urae: the demo</title><style>{_STYLE}</style>
<h1>The miniature beyond its native size</h1>
<p>A FLUX of 5 M parameters, at home at 256 x 256. At 512 x 512, its 2K, it fails as FLUX.1 does at
2048 x 2048. A LoRA trained for {steps} steps on this machine lowers the loss on held-out pictures;
that its pictures hold takes more, as the adapter that ships shows.</p>
<img src="comparison.png" alt="each prompt at native size, then at 2K without and with adapters">
<h2>What the scene check reads in them</h2>
<table><tr><th>caption</th>{head}</tr>{rows}</table>
<h2>Training</h2>
<p>Loss on held-out pictures, always with the same noises: {escape(improvement)} (95% interval of
the change, over pictures).</p>
<img src="loss.png" alt="loss by step" style="max-width: 100%">
<h2>Next</h2>
<p>On a GPU, train as the adapter that ships was:
<code>urae miniature data clean scenes --side 512 --count 3000</code>, then
<code>urae cache scenes --model miniature-dev --resolution 512</code> and
<code>urae train recipes/miniature_2k_lora.toml --data scenes --output runs/miniature_2k</code>.<br>
On FLUX.1, cache your own pictures with <code>--model flux-dev --resolution 2048</code> and train
<code>recipes/flux_dev_2k_lora.toml</code>: see <a href="../../README.md">the
README</a>, <a href="../../docs/train.md">training</a> and
<a href="../../docs/miniature.md">the miniature</a>.</p>
</html>
""")


def _describe(picture: Image.Image, prompt: str) -> str:
    pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    report: SceneReport = check_scene(pixels, parse_caption(prompt))
    wrong = [name for name, holds in asdict(report).items() if not holds]
    if not wrong:
        return '<span class="yes">all of it holds</span>'
    return f'<span class="no">wrong: {escape(", ".join(wrong))}</span>'
