"""The report page's style sheet: light and dark, phone and paper. It is inlined into the page."""

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5b5b60; --line: #d5d5da;
  --back: #ffffff; --panel: #f4f4f6; --accent: #0072b2; --warn: #b04e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececee; --soft: #a9a9b0; --line: #3c3c42;
  --back: #17171a; --panel: #232328; --accent: #56b4e9; --warn: #f0a060; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 2rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 0.8rem; padding-top: 0.8rem; border-top: 1px solid var(--line); }
.kind { margin: 0; color: var(--accent); font-weight: 600; }
.lead { max-width: 46rem; font-size: 1.1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 0.75rem;
  margin: 1.2rem 0; padding: 0; list-style: none; }
.cards li { padding: 0.7rem 0.9rem; border-radius: 0.5rem; background: var(--panel); }
.cards b { display: block; font-size: 1.5rem; line-height: 1.3; }
.cards span, .notes, figcaption, small { color: var(--soft); font-size: 0.88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { white-space: nowrap; }
.n { padding: 0.3rem 0 0.3rem 1.4rem; text-align: right; white-space: nowrap; }
.facts th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.notes { padding-left: 1.1rem; }
figure { margin: 1.6rem 0; }
figure img { display: block; width: 100%; min-width: 34rem; max-width: 60rem; height: auto;
  padding: 0.5rem; border-radius: 0.4rem; background: #ffffff; border: 1px solid var(--line); }
figcaption { margin-top: 0.4rem; max-width: 46rem; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { margin: 0.4rem 0; padding: 0.7rem 0.9rem; border-radius: 0.4rem; background: var(--panel);
  font-size: 0.82rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.missing { padding: 0.2rem 1rem; border-left: 4px solid var(--warn); background: var(--panel); }
.missing h2 { margin: 0.6rem 0; padding: 0; border: 0; color: var(--warn); font-size: 1.1rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .cards li { break-inside: avoid; } h2 { break-after: avoid; margin-top: 1.2rem; }
  figure img { width: auto; min-width: 0; max-height: 8cm; } th, td { padding-block: 0.15rem; }
  .cards li, pre, .missing { border: 1px solid var(--line); } }
"""
