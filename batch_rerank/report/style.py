"""How a report looks: one style sheet, light and dark by the reader's own setting, for screens and paper."""

FIGURE = """
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:var(--muted)}
.axis{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.value{fill:var(--ink);font-weight:600;font-size:14px}
.bar{fill:var(--main)}.soft{fill:var(--main);opacity:.55}.up{fill:var(--up)}.down{fill:var(--down)}
.still{fill:var(--still)}
.one{fill:var(--s1)}.two{fill:var(--s2)}.three{fill:var(--s3)}.four{fill:var(--s4)}.five{fill:var(--s5)}
.six{fill:var(--s6)}
.lane{fill:var(--lane)}.gap{fill:var(--paper)}
.grid{stroke:var(--line);stroke-width:1;shape-rendering:crispEdges}
.base{stroke:var(--axis);stroke-width:1;shape-rendering:crispEdges}
.mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
.then{fill:none;stroke:var(--then);stroke-width:1.6;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.rate{fill:var(--main);fill-opacity:.16;stroke:var(--main);stroke-width:1.6;vector-effect:non-scaling-stroke}
.swatch{fill:var(--then)}
.paper{fill:var(--paper)}
"""

LIGHT = """
--paper:#fff;--ground:#f6f5f2;--ink:#1b2430;--muted:#5d6774;--line:#e7e5df;--axis:#a8adb5;--main:#17766f;
--then:#b7641a;
--up:#17766f;--down:#b7641a;--still:#b9bec6;--lane:#ece9e3;--good:#1a7f4b;--warn:#a2660a;--bad:#b3372f;--open:#3b62a8;
--goodbg:#eaf5ee;--warnbg:#fbf3e2;--badbg:#fbeceb;--openbg:#ecf1fa;--code:#f3f1ec;
--s1:#17766f;--s2:#5b8fb9;--s3:#c98a3a;--s4:#8a6fb0;--s5:#b9bec6;--s6:#c46a77;
"""

DARK = """
--paper:#171d25;--ground:#10151b;--ink:#e8ebef;--muted:#9aa5b2;--line:#29313b;--axis:#4c5764;--main:#45b3a6;
--then:#e3a35c;
--up:#45b3a6;--down:#e3a35c;--still:#5d6875;--lane:#222a34;--good:#5cc98d;--warn:#e0b058;--bad:#ef8a80;--open:#8fb2ee;
--goodbg:#152a21;--warnbg:#2c2413;--badbg:#331d1c;--openbg:#1a2638;--code:#1f2731;
--s1:#45b3a6;--s2:#7fb0d8;--s3:#e3b06c;--s4:#b39ddb;--s5:#5d6875;--s6:#e08f9b
"""

PAGE = (
    f":root{{color-scheme:light dark;{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:62rem;margin:0 auto;padding:2.2rem 1.25rem 4rem}
header p{margin:.2rem 0;color:var(--muted)}
h1{font-size:1.05rem;font-weight:600;letter-spacing:.01em;margin:0;color:var(--muted)}
h2{font-size:1.2rem;font-weight:650;margin:0 0 .3rem;letter-spacing:-.01em}
h3{font-size:.95rem;font-weight:600;margin:1.3rem 0 .3rem}
section{margin-top:2.6rem}
section>p,.card>p{margin:.15rem 0 .7rem;color:var(--muted);max-width:44rem}
.verdict{border-radius:14px;padding:1.1rem 1.3rem;margin:1rem 0 1.4rem}
.verdict p{font-size:1.45rem;line-height:1.3;font-weight:650;letter-spacing:-.015em;margin:0;overflow-wrap:anywhere}
.verdict ul{margin:.6rem 0 0;padding-left:1.1rem;overflow-wrap:anywhere;white-space:pre-line}
.verdict li{margin:.15rem 0}
.good{background:var(--goodbg)}.good p{color:var(--good)}.warn{background:var(--warnbg)}.warn p{color:var(--warn)}
.bad{background:var(--badbg)}.bad p{color:var(--bad)}.open{background:var(--openbg)}.open p{color:var(--open)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:.7rem;margin:0}
.tiles div{background:var(--paper);border-radius:12px;padding:.8rem .95rem}
.tiles dt{color:var(--muted);font-size:.82rem}
.tiles dd{margin:.1rem 0 0;font-size:1.5rem;line-height:1.2;font-weight:600;letter-spacing:-.015em}
.tiles small{display:block;font-size:.8rem;font-weight:400;color:var(--muted);letter-spacing:0;line-height:1.35;
margin-top:.15rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:.9rem}
.card{background:var(--paper);border-radius:14px;padding:1.05rem 1.2rem;min-width:0}
.card h3{margin-top:0}
.card+.card.wide,.cards+.card,.card+.cards,.tiles+.card,.tiles+.cards{margin-top:.9rem}
figure{margin:.4rem 0 0}
figcaption{color:var(--muted);font-size:.84rem;margin-top:.35rem}
svg{display:block;max-width:100%;overflow:visible}
svg svg{overflow:hidden}
.key{display:inline-flex;gap:.4rem;align-items:center;margin-right:1.1rem;white-space:nowrap}
.key svg{display:inline-block;width:14px;height:10px}
details{margin-top:.55rem;font-size:.88rem}
summary{cursor:pointer;color:var(--muted);width:fit-content}
summary:focus-visible{outline:2px solid var(--main);outline-offset:3px;border-radius:4px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;padding:.34rem .8rem .34rem 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
thead th{color:var(--muted);font-weight:500;white-space:nowrap}
tbody th{font-weight:500}
td.n,th.n{text-align:right;white-space:nowrap;padding-right:1.1rem}
th:first-child,td:first-child{min-width:6.5rem}
tr:last-child>*{border-bottom:0}
.movers{list-style:none;margin:0;padding:0}
.movers li{padding:.75rem 0;border-bottom:1px solid var(--line)}
.movers li:last-child{border-bottom:0}
.movers .way{font-weight:600;white-space:nowrap}
.movers .rise{color:var(--up)}.movers .fall{color:var(--down)}
.movers .ids{color:var(--muted);font-size:.84rem;overflow-wrap:anywhere}
.movers .ask{margin:.2rem 0;font-weight:500;overflow-wrap:anywhere;white-space:pre-wrap}
.movers pre{margin:.3rem 0 0;max-height:8.4rem;overflow:auto}
pre,code{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{background:var(--code);border-radius:8px;padding:.6rem .75rem;white-space:pre-wrap;overflow-wrap:anywhere;
margin:.5rem 0 0}
code{background:var(--code);border-radius:5px;padding:.08rem .3rem;overflow-wrap:anywhere}
.esc{color:var(--bad);opacity:.85}
.state{font-weight:600}.state.held{color:var(--good)}.state.failed{color:var(--bad)}.state.warned{color:var(--warn)}
.state.over{color:var(--muted)}
.lanes{display:grid;grid-template-columns:minmax(6rem,auto) minmax(0,1fr) auto;gap:.2rem .8rem;align-items:center;
font-size:.82rem;margin-top:.5rem}
.lanes span{color:var(--muted);overflow-wrap:anywhere}
footer{margin-top:3rem;color:var(--muted);font-size:.82rem;overflow-wrap:anywhere}
@media (max-width:34rem){main{padding:1.3rem .85rem 3rem}.verdict p{font-size:1.2rem}
.tiles{grid-template-columns:repeat(2,1fr);gap:.5rem}
.tiles dd{font-size:1.25rem}.card{padding:.9rem .95rem;border-radius:12px}
.lanes{grid-template-columns:minmax(0,1fr) auto}.lanes svg{grid-column:1/-1;order:3}.lanes .name{order:1}
.lanes .idle{order:2}.lanes{row-gap:.1rem}}
@media print{:root{"""
    + LIGHT
    + """--ground:#fff;--code:#f6f6f6}
@page{margin:14mm}
body{font-size:10pt}main{max-width:none;padding:0}.card,.tiles div{border:1px solid var(--line)}
.card,figure,.movers li,tr,.verdict{break-inside:avoid}.card:has(.movers){break-inside:auto}
section{margin-top:1.3rem}h2,h3{break-after:avoid}.cards{grid-template-columns:1fr 1fr}
.tiles{grid-template-columns:repeat(4,1fr)}.tiles dd{font-size:1.15rem}
.movers pre{max-height:5.6rem;overflow:hidden}pre,code{font-size:8pt}table{font-size:8pt}th,td{padding-right:.4rem}
td.n,th.n{padding-right:.5rem}.scroll{overflow:visible}summary{display:none}.verdict{border:1px solid var(--line)}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
    + FIGURE
)

ALONE = f":root,svg{{{LIGHT}}}@media (prefers-color-scheme:dark){{:root,svg{{{DARK}}}}}{FIGURE}".replace("\n", "")
"""Of a figure that is a file of its own."""
