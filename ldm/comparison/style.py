"""How the page looks, and the few lines of script that let one choose."""

STYLE = """
:root { --ink: #1c1f24; --soft: #667; --line: #dde1e6; --paper: #fff; --raised: #f6f7f9; --best: #e3f2e8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #343a42; --paper: #14171b; --raised: #1d2127;
    --best: #1f3a2b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px; color: var(--ink); background: var(--paper);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
p.note { color: var(--soft); margin: 0 0 12px; }
.legend { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 4px 18px;
  padding: 10px 0; background: var(--paper); border-bottom: 1px solid var(--line); }
.legend label { cursor: pointer; display: inline-flex; align-items: center; gap: 6px; }
.legend svg { width: 28px; height: 10px; }
.controls { display: flex; gap: 20px; align-items: center; margin: 6px 0 12px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 10px; background: var(--raised); border-radius: 8px; position: relative; }
figcaption { font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere; }
.panel svg { width: 100%; height: auto; display: block; overflow: visible; }
.panel svg.log { display: none; }
body.log .has-log svg.log { display: block; }
body.log .has-log svg.linear { display: none; }
svg text { font-size: 13px; fill: var(--soft); stroke: none; } svg .grid { stroke: var(--line); }
.curve polyline { stroke-width: 2; stroke-linejoin: round; }
.curve.train polyline { stroke-width: 1.2; opacity: .75; }
.curve circle { stroke: none; }
.tip { position: absolute; pointer-events: none; padding: 6px 9px; border-radius: 6px; font-size: 12px;
  z-index: 3; background: var(--ink); color: var(--paper); white-space: nowrap;
  transform: translate(12px, -50%); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 5px 10px; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 600; } thead th { border-bottom: 2px solid var(--line); }
td.number { font-variant-numeric: tabular-nums; } td.best { background: var(--best); font-weight: 600; }
td.absent { color: var(--line); }
summary { cursor: pointer; }
details dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px; margin: 4px 0; font-size: 12px;
  font-weight: 400; color: var(--soft); } details dd { margin: 0; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }
.samples img { width: 100%; image-rendering: pixelated; display: none; border-radius: 4px; }
.samples img.shown { display: block; }
input[type=range] { width: min(480px, 60vw); }
"""

SCRIPT = """
const all = (q, where = document) => [...where.querySelectorAll(q)];
document.getElementById('log')?.addEventListener('change',
  event => document.body.classList.toggle('log', event.target.checked));
all('.legend input').forEach(box => box.addEventListener('change', () =>
  all('.run-' + box.dataset.run).forEach(el => { el.style.display = box.checked ? '' : 'none'; })));
const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
const short = n => Number(n.toPrecision(5)).toLocaleString('en');
all('.panel svg').forEach(svg => {
  const tip = document.createElement('div'), d = svg.dataset;
  tip.className = 'tip'; tip.hidden = true; svg.parentNode.append(tip);
  svg.addEventListener('mouseleave', () => { tip.hidden = true; });
  svg.addEventListener('mousemove', event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = ((event.clientX - box.left) * scale - d.left) / (d.right - d.left) * d.end;
    const shown = all('.curve', svg).filter(g => g.style.display !== 'none');
    const read = shown.map(g => [g.dataset.name, nearest(JSON.parse(g.dataset.points), x)]);
    tip.replaceChildren(...read.map(([name, [at, y]]) => {
      const line = document.createElement('div');
      line.textContent = `${name}: ${short(y)} at ${short(at)}`;
      return line;
    }));
    tip.hidden = !read.length;
    const inner = svg.parentNode.getBoundingClientRect(), left = event.clientX - inner.left;
    tip.style.left = Math.min(left, inner.width - tip.offsetWidth - 16) + 'px';
    tip.style.top = (event.clientY - inner.top) + 'px';
  });
});
const slider = document.getElementById('seen');
const show = () => {
  const seen = slider.dataset.values.split(' ').map(Number)[slider.value];
  document.getElementById('seen-now').textContent = seen.toLocaleString('en');
  all('.samples figure').forEach(run => {
    const images = all('img', run);
    const last = images.filter(i => Number(i.dataset.seen) <= seen).pop();
    images.forEach(i => i.classList.toggle('shown', i === last));
    const at = last ? `at ${Number(last.dataset.seen).toLocaleString('en')}` : 'none yet';
    run.querySelector('.at').textContent = at;
  });
};
if (slider) { slider.addEventListener('input', show); show(); }
"""
