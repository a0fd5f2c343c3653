(function () {
  "use strict";
  var data = JSON.parse(document.getElementById("data").textContent), looks = data.looks;
  var font = { family: "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, Arial, sans-serif", size: 12, color: "#1c1f23" };
  var axis = { gridcolor: "#e6e8eb", linecolor: "#8b929b", zeroline: false, ticks: "outside", ticklen: 3, tickcolor: "#8b929b", fixedrange: true };
  var hover = { align: "left", bgcolor: "#fff", font: { color: "#1c1f23" } };

  function text(name) { return name.replace(/&/g, "&amp;").replace(/</g, "&lt;"); }

  function faded(colour) {
    var parts = [1, 3, 5].map(function (at) { return parseInt(colour.slice(at, at + 2), 16); });
    return "rgba(" + parts.join(",") + ",0.13)";
  }

  function curves(chart) {
    var all = [], lines = chart.lines.filter(function (line) { return looks[line.method].shown; });
    if (lines.length <= 4) lines.forEach(function (line) {
      var look = looks[line.method], none = { color: look.colour, width: 0 };
      all.push({ x: line.x, y: line.low, mode: "lines", line: none, hoverinfo: "skip" },
               { x: line.x, y: line.high, mode: "lines", line: none, hoverinfo: "skip", fill: "tonexty", fillcolor: faded(look.colour) });
    });
    if (chart.guess !== null)
      all.push({ x: [1, chart.rounds], y: [chart.guess, chart.guess], mode: "lines", line: { color: "#555b63", width: 1.4, dash: "4px,3px" }, hoverinfo: "skip" });
    lines.forEach(function (line) {
      var look = looks[line.method];
      all.push({ x: line.x, y: line.y, mode: line.x.length < 25 ? "lines+markers" : "lines", line: { color: look.colour, width: 2, dash: look.dash },
                 marker: { size: 5, symbol: look.marker, color: look.colour }, name: text(look.name),
                 hovertemplate: "%{fullData.name}<br>round %{x}: median %{y:.4~g} of " + line.seeds + " seeds<extra></extra>" });
    });
    return all.map(function (trace) { return Object.assign({ type: "scatter", showlegend: false }, trace); });
  }

  function curvesLayout(chart) {
    return { autosize: true, margin: { l: 36, r: 10, t: 8, b: 38 }, hovermode: "closest", dragmode: false, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
             font: font, hoverlabel: hover,
             xaxis: Object.assign({}, axis, { title: { text: "round", standoff: 6 }, showgrid: false, showline: true, nticks: 6,
                                              range: [0.9 - 0.02 * chart.rounds, 1.02 * chart.rounds + 0.1] }),
             yaxis: Object.assign({}, axis, { title: { text: text(chart.unit), font: { size: 11 }, standoff: 4 }, range: chart.top === null ? undefined : [0, chart.top], rangemode: chart.guess === null ? "tozero" : "normal", automargin: true, nticks: 6 }) };
  }

  function ends(chart) {
    var all = [0];
    chart.points.filter(function (point) { return !point.absence; }).forEach(function (point) { all.push(point.mean, point.low === null ? point.mean : point.low, point.high === null ? point.mean : point.high); });
    return [Math.min.apply(null, all), Math.max.apply(null, all)];
  }

  function forest(chart) {
    var room = ends(chart);
    return chart.points.map(function (point) {
      var look = looks[point.method], known = point.low !== null;
      if (point.absence)
        return { type: "scatter", showlegend: false, x: [0], y: [text(look.name)], mode: "text", text: [" " + text(point.absence) + " "],
                 textposition: room[1] >= -room[0] ? "middle right" : "middle left", textfont: { size: 11, color: "#555b63" }, hoverinfo: "skip" };
      return { type: "scatter", showlegend: false, x: [point.mean], y: [text(look.name)], mode: "markers", name: text(look.name),
               marker: { color: look.colour, size: 10, symbol: look.marker + (point.censored ? "-open" : ""), line: { width: 2, color: look.colour } },
               error_x: { visible: known, type: "data", symmetric: false, color: look.colour, thickness: 2, width: 5,
                          array: [known ? point.high - point.mean : 0], arrayminus: [known ? point.mean - point.low : 0] },
               hovertemplate: "%{y}: %{x:+.3~g} rounds; fewer with " + point.fewer + " of " + point.of + " seeds" +
                              (point.censored ? "; " + point.censored + " did not get there" : "") + "<extra></extra>" };
    });
  }

  function forestLayout(chart) {
    var room = ends(chart), low = room[0], high = room[1], pad = 0.08 * (high - low) || 1;
    return { autosize: true, margin: { l: 20, r: 14, t: 6, b: 44 }, hovermode: "closest", dragmode: false, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
             font: font, hoverlabel: hover,
             shapes: [{ type: "line", x0: 0, x1: 0, y0: 0, y1: 1, yref: "paper", line: { color: "#1c1f23", width: 1.2 } }],
             xaxis: Object.assign({}, axis, { title: { text: "rounds against " + text(chart.baseline) + " (left: fewer)", standoff: 8 }, showline: true,
                                              range: [low - pad, high + pad] }),
             yaxis: Object.assign({}, axis, { automargin: true, autorange: "reversed", type: "category", ticks: "", gridcolor: "#f0f1f3",
                                              range: undefined }) };
  }

  function draw() {
    data.charts.forEach(function (chart, index) {
      var place = document.getElementById("chart-" + index), flat = chart.kind === "curves";
      Plotly.react(place, flat ? curves(chart) : forest(chart), flat ? curvesLayout(chart) : forestLayout(chart),
                   { displayModeBar: false, responsive: true }).then(function () {
        var width = place.clientWidth, height = place.clientHeight;
        place.style.setProperty("--shape", width + " / " + height);
        place.querySelectorAll(".main-svg").forEach(function (svg) { svg.setAttribute("viewBox", "0 0 " + width + " " + height); });
      });
    });
  }

  document.querySelectorAll("button.key").forEach(function (button) {
    button.addEventListener("click", function () {
      var look = looks[Number(button.dataset.method)];
      look.shown = !look.shown;
      button.setAttribute("aria-pressed", String(look.shown));
      draw();
    });
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (details) { details.open = true; });
  });
  draw();
})();
