"""The frame of the report's page: markup and style, with places for a title and a body."""

# Figures are drawn on white. Multiplied onto a light page, or inverted and screened onto a dark
# one, their ground vanishes, so one picture serves both.
_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --ink: #1c2430; --soft: #667080; --line: #e2e0dc; --shade: #f1efeb;
  --teacher: #55637a; --student: #0f766e; --control: #b45309;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --ink: #e5e7ea; --soft: #98a2b0; --line: #2b313a; --shade: #1d2229;
    --teacher: #a3b1c8; --student: #4fc7bb; --control: #f0a35e;
  }
  figure img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 50rem; padding: 3.5rem 1.25rem 5rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif;
}
h1, h2, h3 { line-height: 1.3; text-wrap: balance; }
h1 { font: 600 clamp(1.35rem, 4vw, 1.8rem)/1.35 Georgia, 'Times New Roman', serif; margin: 0; }
h2 {
  font-size: 1.15rem; margin: 3.5rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line);
}
h3 { font-size: .8rem; margin: 1.75rem 0 .5rem; color: var(--soft); font-weight: 600; }
.kicker { color: var(--soft); font-size: .85rem; margin: 0 0 .75rem; }
.figures {
  list-style: none; margin: 2rem 0 0; padding: 0; display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr));
}
.figures li { color: var(--soft); font-size: .85rem; line-height: 1.4; }
.figures b {
  display: block; color: var(--ink); font: 600 1.7rem/1.3 Georgia, 'Times New Roman', serif;
  font-variant-numeric: lining-nums tabular-nums;
}
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th, td {
  padding: .5rem 0 .5rem 1.25rem; border-bottom: 1px solid var(--line); vertical-align: top;
}
td, thead th {
  text-align: right; font-variant-numeric: lining-nums tabular-nums; white-space: nowrap;
}
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
thead th { font-weight: 600; border-bottom-color: var(--soft); }
small { display: block; color: var(--soft); font-size: .78rem; font-weight: 400; }
abbr { text-decoration: none; color: var(--soft); cursor: help; }
.note, figcaption { color: var(--soft); font-size: .84rem; margin: .75rem 0 0; }
figure { margin: 0 0 1.5rem; } figure img { width: 100%; height: auto; display: block; }
@media (prefers-color-scheme: light) { figure img { mix-blend-mode: multiply; } }
.teacher, .sample h3.teacher { color: var(--teacher); }
.student, .sample h3.student { color: var(--student); }
.control, .sample h3.control { color: var(--control); }
a { color: var(--student); }
.samples {
  display: grid; gap: .75rem; margin: 0 0 1.75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr));
}
.sample { background: var(--shade); border-radius: .5rem; padding: .75rem .9rem; min-width: 0; }
.sample h3 { margin: 0 0 .4rem; }
pre, code { font-family: ui-monospace, 'SF Mono', Menlo, Consolas, monospace; font-size: .78rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
code { overflow-wrap: anywhere; }
mark { background: none; color: inherit; font-weight: 700; }
pre.command, details pre { background: var(--shade); border-radius: .5rem; padding: .75rem .9rem; }
dl { margin: 0; } dt { font-weight: 600; font-size: .92rem; } dd { margin: 0 0 1rem; }
.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.5rem; font-size: .88rem;
}
.facts dt { color: var(--soft); font-weight: 400; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1.5rem; } summary { cursor: pointer; color: var(--soft); font-size: .88rem; }
details pre { margin-top: .75rem; }
@media print { body { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""

PAGE = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<title>{title}</title>\n<style>'
    + _STYLE.replace('{', '{{').replace('}', '}}')
    + '</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
)
