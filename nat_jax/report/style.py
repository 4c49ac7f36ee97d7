"""The style sheet of the report page: light and dark, from a phone to a wide screen."""

CSS = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --faint: #667080; --line: #e3e6ea;
  --grid: #e6e9ed; --accent: #2f6fb0; --tint: #eef4fa; --good: #1e7d4f; --bad: #b3422f;
  --warn: #fdf3e0; --warn-ink: #7a5206;
  --series-0: #2f6fb0; --series-1: #c8642b; --series-2: #3f8f5f; --series-3: #8a5aa8;
  --series-4: #b08a1e; --series-5: #4a9aa5; --series-6: #b0486a; --series-7: #7a7a7a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2028; --ink: #e6e9ee; --faint: #97a1af; --line: #2b333e;
    --grid: #2a323c; --accent: #74aee8; --tint: #1e2a38; --good: #5fc795; --bad: #ef8a76;
    --warn: #352a15; --warn-ink: #efc77c;
    --series-0: #6ca8e4; --series-1: #ec9460; --series-2: #6cc391; --series-3: #bd92da;
    --series-4: #d9b655; --series-5: #73c3ce; --series-6: #e07b9c; --series-7: #a6a6a6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 var(--font); -webkit-text-size-adjust: 100%;
}
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 56px; }
.over { margin: 0; color: var(--faint); font-size: 13px; letter-spacing: .04em; }
h1 { margin: 2px 0 10px; font-size: 30px; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 0 0 4px; font-size: 19px; letter-spacing: -.005em; }
h3 { margin: 0; font-size: 14.5px; }
p { margin: 0 0 10px; }
.outcome { font-size: 19px; line-height: 1.45; max-width: 46em; margin-bottom: 18px; }
.note { color: var(--faint); font-size: 14px; max-width: 54em; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 30px; margin: 0 0 26px; }
.facts dt { color: var(--faint); font-size: 12.5px; }
.facts dd { margin: 0; font-size: 15px; overflow-wrap: anywhere; }
section, details.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 22px 24px; margin: 0 0 18px;
}
ul.health { list-style: none; margin: 8px 0 0; padding: 0; }
ul.health li { padding: 2px 0 2px 20px; position: relative; }
ul.health li::before {
  content: ""; position: absolute; left: 2px; top: 11px; width: 8px; height: 8px;
  border-radius: 50%; background: var(--good);
}
ul.health li.warning {
  background: var(--warn); color: var(--warn-ink); border-radius: 6px; margin: 4px 0;
  padding: 6px 12px 6px 28px;
}
ul.health li.warning::before { background: var(--warn-ink); left: 11px; top: 15px; }
.scroll { overflow-x: auto; margin: 0 -6px; padding: 0 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.results { width: 100%; font-size: 15px; }
.results th, .results td { text-align: left; padding: 6px 14px 6px 0; white-space: nowrap; }
.results thead th {
  color: var(--faint); font-weight: 500; font-size: 13px; border-bottom: 1px solid var(--line);
}
.results tr.group th { padding-top: 18px; font-size: 13.5px; font-weight: 600; }
.results tbody td { border-top: 1px solid var(--line); }
.results tr.group + tr td { border-top-color: transparent; }
.results td.num, .results th.num { width: 23%; }
.results td:first-child { color: var(--faint); }
.results tr.trained td:nth-child(n + 2) { background: var(--tint); }
.results tr.trained td:nth-child(2) { box-shadow: -8px 0 0 var(--tint); font-weight: 600; }
.results .best .mean { font-weight: 700; color: var(--accent); }
.results .best .mean::after { content: " ★"; font-size: 10px; vertical-align: 2px; }
.std, .gain { font-size: 12.5px; color: var(--faint); margin-left: 7px; }
.gain.up { color: var(--good); }
.gain.down { color: var(--bad); }
.columns {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 12px 26px;
}
.columns h3 { margin-top: 8px; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 26px 30px;
  margin-top: 14px;
}
figure { margin: 0; min-width: 0; }
.charts .note { font-size: 13px; line-height: 1.4; margin: 0 0 6px; }
.charts .note { min-height: 2.8em; }
figure svg, figure img { display: block; width: 100%; height: auto; }
section > p:last-child { margin: 0; }
.pictures figure { margin-top: 22px; }
.pictures h3 { margin-bottom: 8px; }
details summary { cursor: pointer; font-weight: 600; }
section details { margin-top: 18px; }
details.card[open] summary { margin-bottom: 14px; }
table.pairs { font-size: 13.5px; width: 100%; }
.pairs td {
  padding: 3px 18px 3px 0; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: anywhere;
}
.pairs td:first-child { color: var(--faint); white-space: nowrap; width: 1%; }
footer { color: var(--faint); font-size: 13px; padding: 4px 2px; }
@media (max-width: 640px) {
  main { padding: 22px 12px 36px; }
  h1 { font-size: 24px; }
  .outcome { font-size: 17px; }
  section, details.card { padding: 16px 14px; }
  .pairs td:first-child { white-space: normal; width: 42%; }
  .results td.num .std, .results td.num .gain { display: block; margin: 0; line-height: 1.2; }
  .results td.num { vertical-align: top; }
  .charts .note { min-height: 0; }
}
@media print { body { background: none; } section { break-inside: avoid; } }
"""
