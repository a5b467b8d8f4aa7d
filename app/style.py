"""Colours and the style sheet of our own HTML.

Colour says one thing each: gold is how strongly a feature fires (0 to its largest activation), blue
is a logit that goes up, rust one that goes down. The three differ in lightness as well as hue, so
they can be told apart without colour vision, and every coloured thing also carries its number.
"""

ACCENT, GOLD, BLUE, RUST, GRAY = "#7a2e4d", "#e0a526", "#2c6fb3", "#b8562b", "#8b8680"
GOLD_RGB, BLUE_RGB, RUST_RGB = "224,165,38", "44,111,179", "184,86,43"
PLUM = "#a04a70"
"""The accent for charts: light enough for a dark page."""
SERIES = (PLUM, BLUE, "#c08a12", "#3a7d6b", RUST, "#6b5b95", GRAY)
STYLE = """<style>
.lg-muted{color:color-mix(in srgb,currentColor 62%,transparent);font-size:.86rem}
.lg-tokens{font-family:"Source Code Pro",monospace;font-size:.84rem;line-height:1.85;
 white-space:pre-wrap;overflow-wrap:anywhere}
.lg-t{border-radius:3px;padding:.12em 0;cursor:default}
.lg-t.lg-on{color:#1c1917}
.lg-t.lg-focus{box-shadow:inset 0 -2px 0 #7a2e4d;font-weight:600}
.lg-t:hover{outline:1px solid #7a2e4d}
.lg-t:hover::after{content:attr(data-tip);position:fixed;margin:1.7em 0 0 -5em;z-index:999;
 background:#2a2522;color:#fbf8f3;font:400 .74rem/1.5 "Source Sans",sans-serif;white-space:pre;
 padding:.4rem .6rem;border-radius:6px;box-shadow:0 4px 14px rgba(0,0,0,.25);pointer-events:none;
 width:max-content}
.lg-rows{display:flex;flex-direction:column}
.lg-row{display:grid;grid-template-columns:4.2rem minmax(0,1fr);column-gap:.8rem;
 align-items:baseline;padding:.28rem .1rem;
 border-bottom:1px solid color-mix(in srgb,currentColor 9%,transparent)}
.lg-row.lg-stacked{grid-template-columns:4.2rem minmax(0,44fr) minmax(0,56fr);column-gap:0}
.lg-stacked .lg-left{display:flex;justify-content:flex-end;white-space:pre;margin-left:.8rem;
 overflow:hidden}
.lg-stacked .lg-right{white-space:pre;overflow:hidden}
.lg-line{white-space:nowrap;overflow:hidden;text-overflow:ellipsis;display:block}
.lg-value{font-variant-numeric:tabular-nums;font-size:.82rem;text-align:right;
 color:color-mix(in srgb,currentColor 70%,transparent)}
.lg-bars{display:grid;grid-template-columns:minmax(4.5rem,max-content) minmax(0,1fr) max-content;
 column-gap:.6rem;row-gap:3px;align-items:center;font-size:.84rem}
.lg-chip{font-family:"Source Code Pro",monospace;white-space:pre;border-radius:4px;
 padding:.05em .4em; justify-self:start;max-width:13rem;overflow:hidden;text-overflow:ellipsis}
.lg-bar{height:.62rem;border-radius:2px;min-width:1px}
.lg-number{font-variant-numeric:tabular-nums;text-align:right}
.lg-table{border-collapse:collapse;width:100%;font-size:.9rem}
.lg-table th{text-align:right;font-weight:600;padding:.3rem .7rem;
 border-bottom:1px solid color-mix(in srgb,currentColor 35%,transparent)}
.lg-table td{text-align:right;padding:.3rem .7rem;font-variant-numeric:tabular-nums;
 border-bottom:1px solid color-mix(in srgb,currentColor 9%,transparent)}
.lg-table th:first-child,.lg-table td:first-child{text-align:left;padding-left:.1rem}
.lg-table th.lg-words,.lg-table td.lg-words{text-align:left}
.lg-table tr.lg-lead td{font-weight:650;background:rgba(224,165,38,.14)}
.lg-facts{margin:0;padding:0!important;display:grid;grid-template-columns:max-content minmax(0,1fr);
 gap:.15rem 1rem;font-size:.88rem}
.lg-facts dt{margin:0;font-weight:400;color:color-mix(in srgb,currentColor 62%,transparent)}
.lg-facts dd{margin:0;overflow-wrap:anywhere}
.lg-scale{display:inline-block;width:7rem;height:.62rem;border-radius:2px;vertical-align:middle;
 margin:0 .4rem;background:linear-gradient(90deg,rgba(224,165,38,0),rgba(224,165,38,1));
 border:1px solid color-mix(in srgb,currentColor 20%,transparent)}
.lg-key{display:inline-block;width:1.3rem;height:3px;vertical-align:middle;
 margin:0 .4rem 0 1.2rem}
.lg-headlines td,.lg-headlines th{vertical-align:top;padding:.3rem .35rem;line-height:1.35}
.lg-headlines td+td{white-space:nowrap}
.lg-headlines .lg-muted{font-size:.78rem}
.lg-version{padding:.3rem 0;overflow-wrap:anywhere;white-space:pre-wrap;font-size:.9rem;
 border-bottom:1px solid color-mix(in srgb,currentColor 9%,transparent)}
.lg-interval{font-weight:600;margin:.9rem 0 .1rem 0;font-size:.92rem}
.lg-interval span{font-weight:400}
</style>"""

PAGE_STYLE = """<style>
:root{color-scheme:light dark}
body{font:16px/1.5 "Source Sans","Source Sans 3",system-ui,sans-serif;margin:0 auto;padding:1.5rem;
 max-width:84rem;background:#fdfcf9;color:#2a2522;display:grid;gap:0 2.5rem;
 grid-template-columns:minmax(0,5fr) minmax(0,8fr)}
header{grid-column:1/-1}
h1,h2,h3{font-family:Georgia,"Liberation Serif","DejaVu Serif",serif;font-weight:600;
 line-height:1.25;margin:0 0 .5rem 0;overflow-wrap:anywhere}
h1{font-size:1.9rem}h2{font-size:1.15rem}h3{font-size:1rem;margin-top:1rem}
section{margin-top:1.4rem}
.lg-two{display:grid;grid-template-columns:1fr 1fr;gap:1.2rem}
.lg-chart{width:100%;height:auto}
.lg-axis{font-size:13px;fill:currentColor}
.lg-grid{stroke:currentColor;stroke-opacity:.14}
@media(max-width:60rem){body{grid-template-columns:minmax(0,1fr)}}
@media(prefers-color-scheme:dark){body:not(.lg-light){background:#1b1817;color:#ece6de}}
</style>"""
"""What a page that stands alone needs beside `STYLE`: what Streamlit gives to the others."""
