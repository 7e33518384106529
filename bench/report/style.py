"""The report's colours, marks and style sheet; light, dark, and for paper, in the look of the demonstration's page."""

from __future__ import annotations

from cflow_fast.bench.report.charts import Look

CONTENDERS = ("cflow-fast", "freia", "freia-compile", "cflow-ad-loop", "anomalib", "padim", "spade", "encoder")
"""In the order of colours and marks; every other contender takes the last ones."""

LIGHT = ("#0b5cad", "#c2410c", "#7d6200", "#0f7a5c", "#8e3fa8", "#5b6570", "#b4236b", "#1d2126", "#4a7a8c")
DARK = ("#6fb4ff", "#ff9a5c", "#e0c040", "#4fcf9f", "#d79bea", "#aeb8c2", "#ff8fb8", "#e7e9ec", "#8fc4d6")
"""Blue, vermilion, ochre, green, purple, grey, pink: apart in lightness or hue to eyes that miss one kind of cone."""

CONTENDER_MARKS = ("circle", "square", "triangle", "diamond", "cross", "wedge", "plus", "bar", "dash")
PRECISION_DASHES = {"fp32": "", "tf32": "7 3", "tf32x3": "7 3 2 3", "bf16": "2 3", "fp16": "1 4", "fp16x3": "1 4 4 4"}


def look(contender: str, precision: str = "fp32") -> Look:
    """Colour and mark say the contender, dash and filling the precision."""
    place = CONTENDERS.index(contender) if contender in CONTENDERS else len(CONTENDERS)
    is_hollow = precision not in ("fp32", "tf32", "tf32x3", "fp16x3")
    return Look(f"s{place}", CONTENDER_MARKS[place], PRECISION_DASHES.get(precision, "5 5"), is_hollow)


def _series(colours: tuple[str, ...]) -> str:
    return " ".join(f"--s{place}: {colour};" for place, colour in enumerate(colours))


STYLE = f"""
:root {{
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2126; --faint: #5b6570; --line: #dfe1e4; --grid: #eceef0;
  --wrong: #c0322b; --link: #0b5cad;
  {_series(LIGHT)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #14161a; --card: #1c1f25; --ink: #e7e9ec; --faint: #9aa4b0; --line: #31363e; --grid: #2a2f36;
    --wrong: #ff8078; --link: #7db8f5;
    {_series(DARK)}
  }}
}}
@media print {{
  :root {{
    color-scheme: light;
    --paper: #fff; --card: #fff; --ink: #000; --faint: #444; --line: #bbb; --grid: #ddd;
    --wrong: #a3241e; --link: #000;
    {_series(LIGHT)}
  }}
}}
.paper {{ --c: var(--ink); }}
{"".join(f".s{place} {{ --c: var(--s{place}); }} " for place in range(len(LIGHT)))}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{
  margin: 0 auto; padding: 28px 20px 60px; max-width: 1100px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}}
h1 {{ margin: 0 0 12px; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; text-wrap: balance; }}
h2 {{ margin: 56px 0 6px; font-size: 1.45rem; }}
h3 {{ margin: 0 0 8px; font-size: 1rem; overflow-wrap: anywhere; }}
p {{ margin: 0 0 8px; max-width: 70ch; overflow-wrap: break-word; }}
header p {{ color: var(--faint); }}
a {{ color: var(--link); }}
code {{ font: 0.92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--ink); overflow-wrap: anywhere; }}
nav ul, .claims, .sources {{ margin: 0; padding: 0; list-style: none; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 16px; font-size: 0.95rem; }}
.claims {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 14px; }}
.claims li, article, figure {{
  padding: 14px 16px; border: 1px solid var(--line); border-radius: 10px; background: var(--card); break-inside: avoid;
}}
.claims ul {{ margin: 4px 0 8px; padding: 0; list-style: none; }}
.claims ul li {{ padding: 0; border: 0; color: var(--faint); font-size: 0.9rem; }}
.claims ul li {{ white-space: nowrap; }}
.claims h3 {{ margin: 0; }}
.claims b {{ display: inline-block; min-width: 7.2em; color: var(--ink); font-size: 1.15rem; }}
header h2 {{ margin: 22px 0 8px; font-size: 1rem; color: var(--faint); font-weight: 600; }}
.claims p {{ margin: 0; font-size: 0.85rem; overflow-wrap: anywhere; }}
b {{ font-variant-numeric: tabular-nums; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }}
.figures {{ margin-top: 16px; align-items: start; }}
.pairs {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }}
figure {{ margin: 0; padding: 12px; }}
figcaption {{ margin-bottom: 8px; font-size: 0.9rem; line-height: 1.35; overflow-wrap: anywhere; }}
figcaption span {{ display: block; color: var(--faint); font-size: 0.82rem; }}
svg {{ display: block; width: 100%; max-width: 440px; height: auto; overflow: visible; font-size: 11.5px; }}
svg text {{ fill: var(--ink); }}
svg .tick, svg .axis {{ fill: var(--faint); font-variant-numeric: tabular-nums; }}
svg .value {{ font-variant-numeric: tabular-nums; }}
svg .heading {{ font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 5px; }}
svg .grid {{ stroke: var(--grid); }}
svg .rule {{ stroke: var(--faint); }}
svg .level {{ stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 4 3; fill: none; }}
svg .peak {{ stroke: var(--ink); stroke-width: 1.2; fill: none; }}
svg .leader {{ stroke: var(--line); fill: none; }}
svg .curve {{ stroke: var(--c); stroke-width: 2; fill: none; }}
svg .mark {{ stroke: var(--c); stroke-width: 1.8; fill: var(--c); }}
svg .mark.hollow {{ fill: var(--card); }}
svg .fill {{ fill: var(--c); stroke: var(--c); fill-opacity: 0.85; }}
svg .fill.hollow {{ fill-opacity: 0.3; }}
svg .whisker {{ stroke: var(--c); stroke-width: 1.6; }}
.scroll {{ margin-top: 12px; overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
th, td {{ padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; }}
td {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
thead th {{ color: var(--faint); font-size: 0.85rem; font-weight: 500; vertical-align: bottom; }}
th:first-child, .name {{ text-align: left; }}
tbody th {{ min-width: 150px; font-weight: 500; }}
td.name {{ white-space: normal; min-width: 110px; }}
.note {{ min-width: 220px; text-align: left; white-space: normal; color: var(--wrong); }}
details {{ margin-top: 14px; }}
details p {{ margin-top: 8px; color: var(--faint); font-size: 0.9rem; }}
summary {{ padding: 6px 0; color: var(--link); cursor: pointer; }}
details + details {{ margin-top: 2px; }}
.sources {{ margin-top: 14px; color: var(--faint); font-size: 0.82rem; }}
.sources span {{ display: block; }}
.sources li {{ margin-top: 6px; overflow-wrap: anywhere; }}
article {{ margin-top: 14px; }}
dl {{ display: grid; grid-template-columns: minmax(90px, 170px) minmax(0, 1fr); gap: 4px 14px; margin: 0; }}
dl {{ font-size: 0.9rem; }}
dt {{ color: var(--faint); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
@media (max-width: 640px) {{
  body {{ padding: 20px 12px 40px; }}
  h1 {{ font-size: 1.5rem; }}
  h2 {{ margin-top: 40px; }}
  figure {{ padding: 10px 8px; }}
  dl {{ grid-template-columns: minmax(80px, 110px) minmax(0, 1fr); }}
}}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav {{ display: none; }}
  .figures {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }}
  .fill {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  .scroll {{ overflow: visible; }}
  table {{ font-size: 7.5pt; }}
  td {{ white-space: normal; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  h2, summary {{ break-after: avoid; }}
}}
"""
