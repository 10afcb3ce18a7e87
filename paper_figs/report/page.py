"""The page of `hlm report`: one HTML file that asks nothing of the network.

Jinja fills it with escaping on, so that no name of a prompt, file or model can become markup.
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --paper: #fcfcfa; --ink: #1f2328; --soft: #59606a; --rule: #dcdcd6; --card: #f3f3ee;
  --good: #0b5c47; --bad: #a63a00; --bad-fill: #fbe9df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17191c; --ink: #e3e5e8; --soft: #a2a9b3; --rule: #353a41; --card: #202429;
    --good: #6fcfb0; --bad: #ff9d6b; --bad-fill: #3d2417;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.6 system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
}
p, li, figcaption, dl { max-width: 46rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.02rem; margin: 2rem 0 .5rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .89rem; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  margin: 1rem 0 0; }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--soft); }
.short { max-width: 50rem; margin: 1.4rem 0; padding: .9rem 1.2rem; border-radius: 8px;
  background: var(--card); }
.short ul { margin: 0; padding-left: 1.1rem; }
.short li + li { margin-top: .45rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .87rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .32rem .75rem .32rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; vertical-align: bottom; border-bottom-color: var(--soft); }
tbody th, td.w { font-weight: 500; white-space: nowrap; }
td.w { font-weight: inherit; }
td.n, th.n { text-align: right; padding-left: .6rem; }
td.n { white-space: nowrap; }
td.t { min-width: 16rem; }
td.missed { color: var(--bad); background: var(--bad-fill); }
td small { color: var(--soft); font-size: .93em; }
td.missed small { color: inherit; }
.yes { color: var(--good); } .no { color: var(--bad); }
figure { margin: 1.6rem 0 2.4rem; }
figure h3 { margin: 0 0 .5rem; }
.sheet { background: #fff; border-radius: 6px; padding: .6rem; min-width: 34rem;
  max-width: 55rem; }
.sheet img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .6rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.1rem;
  margin: .6rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
@media (max-width: 34rem) {
  body { padding-top: 1.2rem; }
  h1 { font-size: 1.4rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print {
  body { max-width: none; } .scroll { overflow: visible; } nav { display: none; }
}
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<nav aria-label="Sections"><ul>
{%- for anchor, name in sections %}
<li><a href="#{{ anchor }}">{{ name }}</a></li>
{%- endfor %}
</ul></nav>
</header>
<main>
<div class="short"><ul>
{%- for line in findings %}
<li>{{ line }}</li>
{%- endfor %}
</ul></div>

{%- macro definitions(rows) %}<dl>
{%- for name, value in rows %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{%- endfor %}
</dl>{% endmacro %}
{%- macro head(titles, numbers) %}<thead><tr>
{%- for title in titles %}<th>{{ title }}</th>{% endfor -%}
{%- for title in numbers %}<th class="n">{{ title }}</th>{% endfor -%}
</tr></thead>{% endmacro %}
{%- macro numbers(texts) %}
{%- for text in texts %}<td class="n">{{ text }}</td>{% endfor -%}
{% endmacro %}
<section id="settings"><h2>Settings</h2>
{{ definitions(settings) }}
</section>

<section id="fit"><h2>Fit</h2>
<p>Rejection probability β against uncertainty u, token by token, by least squares. Intervals:
{{ loaded.interval_note }}.</p>
<div class="scroll"><table>
<thead><tr><th>quantity</th><th class="n">value</th><th>what it says</th></tr></thead>
<tbody>
{%- for key, name, meaning in fit_rows %}
<tr><th scope="row">{{ name }}</th><td class="n">{{ loaded.calibration.fit[key] | number }}</td>
<td class="t">{{ meaning }}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- if loaded.calibration.estimators %}
<h3>Scores that could gate instead</h3>
<div class="scroll"><table>
<thead><tr><th>score</th><th class="n">correlation with β</th><th class="n">AUROC</th>
{%- for level in levels %}<th class="n">skip rate at {{ "%g" % (100 * level | float) }} % risk</th>
{%- endfor %}</tr></thead>
<tbody>
{%- for score in loaded.calibration.estimators %}
<tr><th scope="row">{{ score.label }}</th><td class="n">{{ score.correlation | number }}</td>
<td class="n">{{ score.auroc | number }}</td>
{%- for level in levels %}<td class="n">{{ score.skip_rate_at_risk[level] | number }}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- endif %}
</section>

{% macro points_table(points) %}
<div class="scroll"><table>
{{ head(["policy", "rule"], ["u_th"] + point_columns) }}
<tbody>
{%- for point in points %}
<tr><th scope="row">{{ point.policy }}</th><td class="w">{{ point.rule }}</td>
<td class="n">{{ point.uncertainty_threshold | number }}</td>{{ numbers(predicted_texts(point)) }}
</tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}
<section id="thresholds"><h2>Thresholds and what they are predicted to do</h2>
{%- if loaded.points %}
<p>Derivation <code>{{ loaded.name }}</code>. u_th with its interval, where its rule has one; in
brackets {{ loaded.derived_note }}, for the calibration sampling alone.
{{- " Those that were rerun:" if more_points else "" }}</p>
{{ points_table(loaded.shown) }}
{%- if more_points %}
<details><summary>The other {{ more_points | length }} derived settings</summary>
{{ points_table(more_points) }}
</details>
{%- endif %}
{%- if notes %}
<details{{ " open" if notes | length <= 4 else "" }}><summary>Infeasible or degenerate, and
why</summary>
<ul>
{%- for note in notes %}
<li>{{ note }}</li>
{%- endfor %}
</ul>
</details>
{%- endif %}
{%- else %}
<p>Nothing was derived yet: <code>hlm derive RUN</code>.</p>
{%- endif %}
</section>

<section id="validation"><h2>Predictions against reruns</h2>
{%- if loaded.cells %}
<p>Validation <code>{{ loaded.validation_name }}</code>, of derivation
<code>{{ loaded.validation.derivation }}</code>. {{ loaded.coverage_note }}</p>
{%- if loaded.outdated %}
<p class="no">Derived anew since the rerun, so not compared with today's settings elsewhere on this
page:{% for policy, rule in loaded.outdated %} {{ policy }}/{{ rule }}{{ "," if not loop.last }}
{%- endfor %}. Run <code>hlm validate</code> again.</p>
{%- endif %}
<p class="soft">Measured, and in small what was predicted. Marked ✗: outside its prediction
interval.</p>
<div class="scroll"><table>
<thead><tr><th>policy</th><th>rule</th>
{%- for name in metrics %}<th class="n">{{ name | metric }}</th>{% endfor -%}
</tr></thead>
<tbody>
{%- for (policy, rule), found in loaded.cells_of.items() %}
<tr><th scope="row">{{ policy }}</th><td class="w">{{ rule }}</td>
{%- for name in metrics -%}
{%- if name in found %}{% set cell = found[name] %}
<td class="n{{ ' missed' if cell.covered == false else '' }}">
{{- '✗ ' if cell.covered == false else '' }}{{ cell.measured | number(4, interval=false) }}<br>
{{- '' }}<small>{{ cell.predicted | number(4, interval=false) }}</small></td>
{%- else %}<td class="n">–</td>{% endif -%}
{%- endfor -%}
</tr>
{%- endfor %}
</tbody></table></div>
<div class="scroll"><table>
<caption>Cells inside their prediction intervals</caption>
{{ head(["metric"], ["covered", "cells"]) }}
<tbody>
{%- for name in metrics %}
{%- set own = loaded.cells | selectattr("metric", "equalto", name) | list %}
<tr><th scope="row">{{ name | metric }}</th>
<td class="n">{{ own | selectattr("covered") | list | length }}</td>
<td class="n">{{ own | rejectattr("covered", "none") | list | length }}</td></tr>
{%- endfor %}
</tbody></table></div>
<details><summary>Every cell with its intervals ({{ loaded.cells | length }})</summary>
<div class="scroll"><table>
<thead><tr><th>policy</th><th>rule</th><th>metric</th><th class="n">predicted</th>
<th class="n">measured</th><th>inside</th></tr></thead>
<tbody>
{%- for cell in loaded.cells %}
<tr><th scope="row">{{ cell.policy }}</th><td class="w">{{ cell.rule }}</td>
<td class="w">{{ cell.metric | metric }}</td>
<td class="n">{{ cell.predicted | number(4) }}</td>
<td class="n">{{ cell.measured | number(4) }}</td>
<td class="{{ 'no' if cell.covered == false else 'yes' }}">
{{- 'yes' if cell.covered else ('no' if cell.covered == false else '–') }}</td></tr>
{%- endfor %}
</tbody></table></div>
</details>
{%- else %}
<p>Nothing was rerun yet: <code>hlm validate RUN</code>.</p>
{%- endif %}
</section>

<section id="quality"><h2>How close the texts are to the server model's own</h2>
{%- if quality %}
<p>Means over prompts of the reruns' texts, with intervals in brackets. The backbone is not
the papers': compare these figures with each other, not with published ones.</p>
<div class="scroll"><table>
{{ head(["policy", "rule"], quality_columns) }}
<tbody>
{%- for point, texts in quality %}
<tr><th scope="row">{{ point.policy }}</th><td class="w">{{ point.rule }}</td>
{{- numbers(texts) }}</tr>
{%- endfor %}
</tbody></table></div>
{%- else %}
<p>No texts of current reruns were scored yet: <code>hlm quality RUN</code>.</p>
{%- endif %}
</section>

<section id="figures"><h2>Figures</h2>
{%- for figure in figures %}
<figure id="figure-{{ figure.name }}"><h3>{{ figure.question }}</h3>
<div class="scroll"><div class="sheet"><img src="data:image/png;base64,{{ figure.png }}"
 alt="{{ figure.question }}" width="{{ figure.width }}" height="{{ figure.height }}"></div></div>
<figcaption>{{ figure.caption }}</figcaption></figure>
{%- endfor %}
{%- if left_out %}
<p class="soft">Left out:</p>
<ul class="soft">
{%- for name, reason in left_out.items() %}
<li>{{ name }}: {{ reason }}</li>
{%- endfor %}
</ul>
{%- endif %}
</section>

<section id="audit"><h2>Can the papers' numbers come from one setting?</h2>
<p class="soft">{{ audit_note }}</p>
<div class="scroll"><table>
{{ head(audit_columns, []) }}
<tbody>
{%- for row in audit %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for value in row[1:-1] %}<td class="{{ 'no' if value == 'no' else '' }}">{{ value }}</td>
{%- endfor %}<td class="t">{{ row[-1] }}</td></tr>
{%- endfor %}
</tbody></table></div>
</section>

<section id="provenance"><h2>Provenance</h2>
{{ definitions(provenance) }}
</section>
</main>
</body>
</html>
"""
