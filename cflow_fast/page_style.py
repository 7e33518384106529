"""The result page's style sheet: light and dark, from a phone's width to a desk's, and for paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2126; --faint: #5b6570; --line: #dfe1e4;
  --right: #1a7f46; --wrong: #c0322b; --link: #0b5cad;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f25; --ink: #e7e9ec; --faint: #9aa4b0; --line: #31363e;
    --right: #58c88a; --wrong: #ff8078; --link: #7db8f5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 28px 20px 60px; max-width: 1000px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 12px; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; text-wrap: balance; }
h2 { margin: 52px 0 6px; font-size: 1.45rem; }
h3 { margin: 28px 0 10px; font-size: 1rem; color: var(--faint); font-weight: 600; }
p { margin: 0 0 8px; max-width: 70ch; }
header p { color: var(--faint); }
a { color: var(--link); }
b, td { font-variant-numeric: tabular-nums; }
table { width: 100%; margin: 20px 0 0; border-collapse: collapse; table-layout: fixed; }
th, td { padding: 8px 10px; border-bottom: 1px solid var(--line); text-align: right; }
thead th { color: var(--faint); font-size: 0.85rem; font-weight: 500; vertical-align: bottom; }
tbody th { text-align: left; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; font-size: 0.85rem; color: var(--faint); }
.legend em { font-style: normal; }
.scale { position: relative; width: 200px; height: 12px; border-radius: 6px; }
.scale i {
  position: absolute; top: -4px; width: 3px; height: 20px; margin-left: -1px; border-radius: 2px;
  background: var(--ink); outline: 2px solid var(--paper);
}
article {
  margin: 0 0 14px; padding: 12px 14px 10px; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); break-inside: avoid;
}
article p { margin: 0 0 8px; color: var(--faint); font-size: 0.9rem; }
article b { color: var(--ink); }
.right, .wrong { margin: 0 8px; font-weight: 600; white-space: nowrap; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 10px; }
figure { margin: 0; }
figcaption { margin-top: 3px; font-size: 0.8rem; color: var(--faint); text-align: center; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
.none {
  display: grid; place-items: center; aspect-ratio: 1; border: 1px dashed var(--line); border-radius: 4px;
  color: var(--faint); font-size: 0.85rem; text-align: center;
}
details { margin-top: 22px; }
summary { padding: 8px 0; color: var(--link); cursor: pointer; }
.more { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 14px; }
.more .tiles { gap: 6px; }
.more figcaption { font-size: 0.72rem; }
@media (max-width: 640px) {
  body { padding: 20px 14px 40px; }
  h1 { font-size: 1.5rem; }
  h2 { margin-top: 40px; }
  th, td { padding: 7px 4px; font-size: 0.9rem; }
  article { padding: 10px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .more { grid-template-columns: minmax(0, 1fr); }
  .more .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
}
@media print {
  :root {
    --paper: #fff; --card: #fff; --ink: #000; --faint: #444; --line: #bbb;
    --right: #14663a; --wrong: #a3241e; --link: #000;
  }
  body { max-width: none; padding: 0; font-size: 11pt; }
  .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .scale { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3, .legend { break-after: avoid; }
}
"""
