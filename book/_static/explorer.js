/* The book's two interactive figures: a layer (k against cost, error and time) and a budget (its plan and its loss).

   basis.figures.show(..., explorer={"kind": "layer" or "budget", ...}) writes <div class="basis-explorer"
   data-figure="NAME"> with the facts as JSON in it, and this file after it; nothing is loaded from elsewhere. In the
   book the widget takes the place of the picture in the figure NAME, above its caption; in a notebook it stands below.
   Without scripts, and on paper, there is the picture. */
(() => {
  "use strict";

  // --- what both share: numbers, a chart, the frame of controls, words and charts ---

  const percent = (value) => (100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0) + "\u00a0%";
  const whole = (value) => Math.round(value).toLocaleString("en-US");
  const signed = (value) => value.toFixed(3).replace(/^-/, "\u2212");
  const strong = (text) => `<strong>${text}</strong>`;
  const nearest = (items, x, key) => items.reduce((a, b) => (Math.abs(key(b) - x) < Math.abs(key(a) - x) ? b : a));

  /* A chart of `width` by `height` CSS pixels, so that its text keeps its size on every screen. `x` and `y` are axes
     ({from, to, ticks, text, scale}); `series` are {points, low_high, colour, dashed, faint, dots}; `at` is where the
     vertical marker stands, and `marks` are its points {x, y, colour}. `keys` name the colours. */
  function chart({ title, keys = [], x, y, series, at, marks = [], width, height = 150, xlabel, alt }) {
    const left = 38, right = 8, top = 8, bottom = 34;
    const along = (value, axis, from, to) => {
      const [v, low, high] = [value, axis.from, axis.to].map(axis.scale || ((one) => one));
      return (from + ((v - low) / (high - low)) * (to - from)).toFixed(1);
    };
    const px = (value) => along(value, x, left, width - right);
    const py = (value) => along(value, y, height - bottom, top);
    const grid = y.ticks.map((v) => `<line class="grid" x1="${left}" x2="${width - right}" y1="${py(v)}" y2="${py(v)}"/>
      <text x="${left - 5}" y="${+py(v) + 4}" text-anchor="end">${y.text(v)}</text>`);
    const names = x.ticks.map((v) => `<text x="${px(v)}" y="${height - bottom + 14}" text-anchor="middle">${x.text(v)}</text>`);
    const lines = series.map((one) => {
      const look = `class="${one.colour} ${one.dashed ? "dashed" : ""} ${one.faint ? "faint" : ""}"`;
      const path = one.points.map(([a, b]) => `${px(a)},${py(b)}`).join(" ");
      const bars = (one.low_high || []).map(([a, low, high]) => `<path d="M${px(a)},${py(low)}V${py(high)}"/>`);
      const dots = one.points.map(([a, b]) => `<circle cx="${px(a)}" cy="${py(b)}" r="3"/>`);
      return `<g ${look}>${one.dots ? dots.join("") : `<polyline points="${path}"/>`}${bars.join("")}</g>`;
    });
    const rule = `<line class="marker" x1="${px(at)}" x2="${px(at)}" y1="${top}" y2="${height - bottom}"/>`;
    const points = marks.map((m) => `<circle class="mark ${m.colour}" cx="${px(m.x)}" cy="${py(m.y)}" r="5"/>`);
    const none = series.length ? "" : `<text x="${width / 2}" y="${height / 2}" text-anchor="middle">not measured</text>`;
    const said = keys.map((key) => `<span class="${key.colour}">${key.text}</span>`).join(" ");
    return `<div><p class="head"><b>${title}</b> ${said}</p>
      <svg role="img" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"><title>${alt}</title>
      ${grid.join("")}${names.join("")}${lines.join("")}${rule}${points.join("")}${none}
      <text x="${(left + width - right) / 2}" y="${height - 4}" text-anchor="middle">${xlabel}</text></svg></div>`;
  }

  /* An axis from 0 to at least `most` with at most six round ticks. */
  function axis(most, text) {
    const step = [0.25, 0.5, 1, 2, 5].find((s) => most / s <= 5) || 10;
    const ticks = Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => i * step);
    return { from: 0, to: most * 1.04, ticks, text };
  }

  /* Relative error (Frobenius norm) of the best approximation of each rank from 0 on. */
  function errors(singular) {
    const rest = [0];
    for (const s of [...singular].reverse()) rest.unshift(rest[0] + s * s);
    return rest.map((energy) => Math.sqrt(energy / rest[0]));
  }

  /* Fill `root` with a list to choose from, a slider, a place for words and one for charts; `draw` gets them all. */
  function frame(root, { choice, choices, start, slider, draw }) {
    const options = choices.map((text, i) => `<option value="${i}" ${i === start ? "selected" : ""}>${text}</option>`).join("");
    root.insertAdjacentHTML("beforeend", `<div class="controls">
      <label>${choice} <select>${options}</select></label>
      <label><span></span> <input type="range"></label></div>
      <p class="words" aria-live="polite"></p><div class="charts"></div>`);
    const [select, label, range, words, charts] = ["select", "span", "input", ".words", ".charts"]
      .map((one) => root.querySelector(one));
    const reset = () => Object.assign(range, slider(+select.value)); // min, max, step, value
    const redraw = () => {
      const shown = draw({ chosen: +select.value, value: +range.value, width: Math.max(300, root.clientWidth) });
      label.textContent = shown.label;
      range.setAttribute("aria-valuetext", shown.label);
      words.innerHTML = shown.words;
      charts.style.gridTemplateColumns = shown.columns;
      charts.innerHTML = shown.charts.join("");
    };
    select.onchange = () => { reset(); redraw(); };
    range.oninput = redraw;
    let last = root.clientWidth; // drawing changes the height, which needs no drawing
    new ResizeObserver(() => { if (root.clientWidth !== last) { last = root.clientWidth; redraw(); } }).observe(root);
    select.onchange();
  }

  // --- one layer: what k costs and loses ---

  /* facts: times [{shape, device, ratio, speedup, speedup_q1, speedup_q3}] of layers of ResNet-18, singular_values
     {layer: [the largest first]} of a trained ResNet-18 whose first stage has `width` channels, and the batch. */
  function layer(root, facts) {
    // Shape (in-out@pixels/stride), kernel size, and the layer of the trained network that has the same place.
    const layers = [["3-64@32", 3, "conv1"], ["64@32", 3, "layer1.1.conv1"], ["128@16", 3, "layer2.1.conv1"],
      ["256@8", 3, "layer3.1.conv1"], ["512@4", 3, "layer4.1.conv1"], ["64-128@32/2", 3, "layer2.0.conv1"],
      ["128-256@16/2", 3, "layer3.0.conv1"], ["256-512@8/2", 3, "layer4.0.conv1"], ["128-256@16/2", 1, "layer3.0.shortcut.0"],
    ].map(([shape, kernel, trained]) => {
      const [, inside, out, size, stride = 1] = /(\d+)-?(\d+)?@(\d+)\/?(\d+)?/.exec(shape);
      const name = `${kernel} \u00d7 ${kernel}, ${inside} \u2192 ${out || inside} channels`;
      return { c: +(out || inside), f: inside * kernel ** 2, pixels: (size / stride) ** 2, trained,
        name: name + (stride > 1 ? ", stride 2" : ""), error: errors(facts.singular_values[trained] || []),
        times: facts.times.filter((t) => t.shape === shape && kernel === 3) };
    });
    const own = facts.width || 64, step = 64 / own; // k moves in steps that are whole filters of the trained layer
    const slider = (i) => ({ min: step, max: layers[i].c, step, value: layers[i].c / 4 });
    function draw({ chosen, value: k, width }) {
      const one = layers[chosen], { c, f, pixels } = one, r = k / c;
      const weights = (j) => j * f + (c - j) * j; // B and A
      const share = (j) => weights(j) / (c * f); // of the parameters, and of the MACs where factorized
      const composed = (j) => 1 + ((c - j) * j) / (c * pixels * facts.batch); // dense, and building W once a batch
      const ks = Array.from({ length: c / step }, (_, i) => (i + 1) * step);
      const error = one.error.length > 1 && ((j) => one.error[j / step] ?? 0); // a stem has fewer values than filters
      const devices = [...new Set(one.times.map((t) => t.device))].map((name, i) =>
        [["c3", "c4", "c5"][i], one.times.filter((t) => t.device === name)]);
      const near = devices.map(([colour, some]) => [colour, nearest(some, r, (t) => t.ratio)]);
      const columns = width < 560 ? 2 : 4, most = Math.max(1, ...ks.map(share));
      const base = { width: Math.floor((width - 12 * (columns - 1)) / columns), at: r, xlabel: "r = k / C_out",
        x: { from: 0, to: 1, ticks: [0, 0.5, 1], text: (v) => v } };
      /* A chart of functions of k: lines are [colour, function, name]. */
      const curves = (title, top, ...lines) => chart({ ...base, title, y: axis(top, percent),
        alt: `${title} over the ratio r, marked at ${r.toFixed(2)}`,
        keys: lines.map(([colour, fn, name = ""]) => ({ colour, text: `${name} ${percent(fn(k))}` })),
        series: lines.map(([colour, fn]) => ({ colour, points: ks.map((j) => [j / c, fn(j)]) })),
        marks: lines.map(([colour, fn]) => ({ colour, x: r, y: fn(k) })) });
      const speeds = devices.map(([colour, some]) => ({ colour, faint: true, dots: true,
        points: some.map((t) => [t.ratio, t.speedup]), low_high: some.map((t) => [t.ratio, t.speedup_q1, t.speedup_q3]) }));
      const charts = [
        curves("Parameters", most, ["c1", share]),
        curves("MACs forward", Math.max(most, composed(c / 2)), ["c1", share, "factorized"], ["c2", composed, "composed"]),
        curves("Error, rank k", 1, ...(error ? [["c1", error]] : [])),
        chart({ ...base, title: "Speed-up", y: axis(Math.max(1, ...one.times.map((t) => t.speedup_q3)), (v) => v), series: speeds,
          alt: "Measured speed-up over the ratio r; the points nearest to the marker stand out",
          keys: near.map(([colour, t]) => ({ colour, text: `${t.device} ${t.speedup.toFixed(2)}` })),
          marks: near.map(([colour, t]) => ({ colour, x: t.ratio, y: t.speedup })) }),
      ];
      const times = near.map(([, t], i) =>
        `${strong(t.speedup.toFixed(2) + " times")}${i ? "" : " as fast as dense"} on the ${t.device} (r\u00a0=\u00a0${t.ratio})`);
      const words = `${strong(`k = ${k} of ${c}`)} filters: ${strong(percent(share(k)))} of the parameters (${whole(weights(k))} of
        ${whole(c * f)}). Factorized, the forward pass needs the same share of the MACs; composed, ${strong(percent(composed(k)))}. ` +
        (error ? `The best approximation of rank ${k / step} of the ${c / step} filters of
        <code>${one.trained}</code> in a trained ResNet-18 of width ${own} has a relative error of
        ${strong(percent(error(k)))}. ` : "") + (near.length ? `At the nearest measured ratio a training step of the layer is
        ${times.join(" and ")}.` : "Its time was not measured.");
      return { label: `k = ${k} of ${c} (r = ${r.toFixed(2)})`, words, charts, columns: `repeat(${columns}, 1fr)` };
    }
    frame(root, { choice: "Layer", choices: layers.map((one) => one.name), start: 2, slider, draw });
  }

  // --- one budget: which plan, and what it loses ---

  /* facts: model and its accuracy, widths {layer: C_out} in network order, rules {name: words}, rows [{budget, rule, plan,
     macs, predicted, growth, growth_low, growth_high, n, accuracy}]. */
  function budget(root, facts) {
    const names = Object.keys(facts.rules), colour = (rule) => ["c1", "c4"][names.indexOf(rule)];
    const of = (rule) => facts.rows.filter((row) => row.rule === rule);
    const slider = (i) => {
      const all = of(names[i]).map((row) => row.budget);
      return { min: 0, max: all.length - 1, step: 1, value: all.indexOf(nearest(all, 0.5, (b) => b)) };
    };
    function bars(row, width) {
      const pitch = 15, left = 122, right = 50, room = width - left - right, layers = Object.entries(facts.widths);
      const lines = layers.map(([name, c], i) => {
        const k = row.plan[name] ?? c, y = i * pitch, dense = !(name in row.plan);
        const rect = (look, share) =>
          `<rect class="${look}" x="${left}" y="${y + 2}" width="${room * share}" height="${pitch - 4}"/>`;
        return `<text x="${left - 6}" y="${y + 11}" text-anchor="end">${name}</text>
          ${rect("track", 1)}${rect(dense ? "dense" : colour(row.rule), k / c)}
          <text x="${left + room + 5}" y="${y + 11}">${dense ? "dense" : `${k}/${c}`}</text>`;
      });
      const height = pitch * layers.length;
      return `<div><p class="head"><b>The plan: k of C_out</b></p><svg role="img" width="${width}" height="${height}"
        viewBox="0 0 ${width} ${height}"><title>The share of filters that each layer keeps</title>${lines.join("")}</svg></div>`;
    }
    function draw({ chosen, value, width }) {
      const rule = names[chosen], row = of(rule)[value], wide = width >= 620;
      const each = wide ? Math.floor((width - 20) / 2) : width;
      const bend = (v) => Math.asinh(v / 0.01); // straight below 0.01, logarithmic above, and fit for losses that shrink
      const all = facts.rows.flatMap((one) => [one.predicted, one.growth_low, one.growth_high]);
      const y = { from: Math.min(-0.005, ...all), to: Math.max(...all), scale: bend, text: (v) => v,
        ticks: [0, 0.01, 0.1, 1, 10].filter((v) => v <= Math.max(...all)) };
      const series = names.flatMap((one) => [
        { colour: colour(one), faint: one !== rule, dashed: true, points: of(one).map((o) => [o.budget, o.predicted]) },
        { colour: colour(one), faint: one !== rule, points: of(one).map((o) => [o.budget, o.growth]),
          low_high: of(one).map((o) => [o.budget, o.growth_low, o.growth_high]) }]);
      const keys = names.map((one) => ({ colour: colour(one), text: facts.rules[one] }));
      const mark = { colour: colour(rule), x: row.budget };
      const growth = chart({ title: "Growth of the loss, nats", width: each, height: wide ? 286 : 230, y, series, at: row.budget,
        keys: [...keys, { text: "(dashed: predicted)" }], xlabel: "budget, share of the parameters",
        x: { from: 0.08, to: 0.97, ticks: [0.1, 0.25, 0.5, 0.75, 0.95], text: percent },
        marks: [{ ...mark, colour: mark.colour + " hollow", y: row.predicted }, { ...mark, y: row.growth }],
        alt: `Growth of the loss over the budget, predicted and measured, marked at ${percent(row.budget)}` });
      const cut = Object.keys(row.plan).length, total = Object.keys(facts.widths).length;
      const words = `${strong(percent(row.budget))} of the parameters, ${strong(facts.rules[rule])}: ${strong(`${total - cut} of ${total}`)}
        convolutions stay dense, and ${strong(percent(row.macs))} of the MACs remain. The sensitivities sum to a growth of
        ${strong(signed(row.predicted))} nats; with all layers cut at once the loss grows by ${strong(signed(row.growth))} nats,
        95\u00a0% interval [${signed(row.growth_low)}, ${signed(row.growth_high)}], on ${whole(row.n)} held-out images, of which
        ${strong((100 * row.accuracy).toFixed(1) + "\u00a0%")} are classified correctly (dense ${(100 * facts.accuracy).toFixed(1)}\u00a0%;
        ${facts.model}, not trained again).`;
      const label = `Budget: ${percent(row.budget)} of the parameters`;
      return { label, words, charts: [bars(row, each), growth], columns: wide ? "1fr 1fr" : "1fr" };
    }
    frame(root, { choice: "Rule", choices: names.map((name) => facts.rules[name]), slider, draw });
  }

  // --- where the widgets are, and how they look ---

  const STYLE = `
    .basis-explorer { --c1: #2f5fb3; --c2: #c8553d; --c3: #008a7a; --c4: #7b3294; --c5: #b7791f;
      font-size: 15px; line-height: 1.45; text-align: left; max-width: 800px; min-width: 300px; margin: 0.6rem auto; }
    :is([data-theme="dark"], [theme="dark"], [data-jp-theme-light="false"], .vscode-dark) .basis-explorer {
      --c1: #7fabf5; --c2: #f58f78; --c3: #4fd0bd; --c4: #c58be0; --c5: #f0b754; }
    .basis-explorer .controls { display: flex; flex-wrap: wrap; gap: 0.4rem 1.2rem; }
    .basis-explorer label { flex: 1 1 260px; display: block; margin: 0; font-weight: 600; }
    .basis-explorer :is(select, input) { display: block; width: 100%; height: 36px; margin: 2px 0 0; font: inherit; font-weight: 400;
      accent-color: var(--c1); touch-action: pan-y; }
    .basis-explorer select { color: inherit; background: transparent; border: 1px solid; border-radius: 6px; padding: 0 8px; }
    .basis-explorer option { color: #1f2328; background: #fff; }
    .basis-explorer .words { margin: 0.5rem 0; }
    .basis-explorer .charts { display: grid; gap: 12px; align-items: end; }
    .basis-explorer .head { margin: 0; font-size: 13px; line-height: 1.35; }
    .basis-explorer .head span { white-space: nowrap; font-weight: 600; }
    .basis-explorer svg { display: block; max-width: 100%; overflow: visible; }
    .basis-explorer text { font-size: 11px; fill: currentColor; }
    .basis-explorer :is(circle, rect) { fill: currentColor; }
    .basis-explorer :is(line, path, polyline, .hollow) { fill: none; stroke: currentColor; stroke-width: 1.8; }
    .basis-explorer .grid { stroke-width: 1; stroke-opacity: 0.18; }
    .basis-explorer .marker { stroke-width: 1; stroke-opacity: 0.6; }
    .basis-explorer .dashed { stroke-dasharray: 5 4; }
    .basis-explorer .faint { opacity: 0.55; } .basis-explorer .track { opacity: 0.1; } .basis-explorer .dense { opacity: 0.4; }
    ${[1, 2, 3, 4, 5].map((i) => `.basis-explorer .c${i} { color: var(--c${i}); }`).join(" ")}
    @media (max-width: 560px) { .basis-explorer { display: flex; flex-direction: column; } .basis-explorer .words { order: 1; } }
    @media screen { .basis-live > :not(figcaption, .basis-explorer) { display: none; } }
    @media print { .basis-explorer { display: none; } }`;

  function start() {
    for (const root of document.querySelectorAll(".basis-explorer:not([data-started])")) {
      root.dataset.started = "";
      const facts = JSON.parse(root.querySelector("script").textContent);
      root.insertAdjacentHTML("beforeend", `<style>${STYLE}</style>`);
      const figure = document.getElementById("fig-" + root.dataset.figure); // the book's numbered figure
      const output = root.closest(".cell_output");
      figure?.classList.add("basis-live");
      figure?.prepend(root);
      if (figure && !output?.querySelector("img, pre, p, table")) output?.remove();
      ({ layer, budget })[facts.kind](root, facts);
    }
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
