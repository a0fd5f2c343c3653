(function () {
  "use strict";
  // Plotly reads names as HTML.
  function text(name) { return name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); }

  function faded(colour) {
    var parts = [1, 3, 5].map(function (at) { return parseInt(colour.slice(at, at + 2), 16); });
    return "rgba(" + parts.join(",") + ",0.16)";
  }

  function trace(line, y, extra) {
    var few = y.length < 30 || y.indexOf(null) >= 0;
    var styles = {
      mean: { mode: few ? "lines+markers" : "lines", line: { color: line.colour, width: 2.2 }, marker: { size: 4.5 } },
      client: { mode: few ? "lines+markers" : "lines", line: { color: line.colour, width: 1 }, marker: { size: 2.5 }, opacity: 0.5 },
      target: { mode: few ? "lines+markers" : "lines", line: { color: line.colour, width: 1.4, dash: "4px,3px" }, marker: { size: 2.5 }, opacity: 0.75 },
      guess: { mode: "lines", line: { color: line.colour, width: 1.4, dash: "4px,3px" } },
      band: { mode: "lines", line: { color: line.colour, width: 0 }, fillcolor: faded(line.colour), hoverinfo: "skip" }
    };
    var base = { type: "scatter", x: line.x, y: y, name: text(line.name), showlegend: false, connectgaps: false };
    if (line.kind !== "band") base.hovertemplate = "%{fullData.name}<br>round %{x}: %{y:.4~g}<extra></extra>";
    return Object.assign(base, styles[line.kind], extra);
  }

  function traces(chart) {
    var all = [];
    chart.lines.forEach(function (line) {
      if (line.kind === "band") all.push(trace(line, line.low, {}), trace(line, line.y, { fill: "tonexty" }));
      else all.push(trace(line, line.y, {}));
    });
    return all;
  }

  function layout(chart) {
    var axis = { gridcolor: "#e6e8eb", linecolor: "#8b929b", zeroline: false, ticks: "outside", ticklen: 3, tickcolor: "#8b929b", fixedrange: true };
    var pad = 0.1 + 0.02 * chart.rounds;
    return {
      autosize: true, margin: { l: 34, r: 10, t: 8, b: 38 }, hovermode: "closest", dragmode: false,
      paper_bgcolor: "#fff", plot_bgcolor: "#fff",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, Arial, sans-serif", size: 12, color: "#1c1f23" },
      hoverlabel: { align: "left", bgcolor: "#fff", font: { color: "#1c1f23" } },
      xaxis: Object.assign({}, axis, { title: { text: "round", standoff: 6 }, showgrid: false, showline: true, nticks: 6,
                                       range: [1 - pad, chart.rounds + pad],
                                       dtick: chart.rounds <= 6 ? 1 : undefined }),
      yaxis: Object.assign({}, axis, { rangemode: chart.from_zero ? "tozero" : "normal", automargin: true, nticks: 6 })
    };
  }

  JSON.parse(document.getElementById("charts").textContent).forEach(function (chart, index) {
    var place = document.getElementById("chart-" + index);
    if (!place) return;
    function scalable() {
      var width = place.clientWidth, height = place.clientHeight;
      place.style.setProperty("--shape", width + " / " + height);
      place.querySelectorAll(".main-svg").forEach(function (svg) { svg.setAttribute("viewBox", "0 0 " + width + " " + height); });
    }
    Plotly.newPlot(place, traces(chart), layout(chart), { displayModeBar: false, responsive: true }).then(function () {
      scalable();
      place.on("plotly_afterplot", function () { if (!window.matchMedia("print").matches) scalable(); });
    });
  });

  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (details) { details.open = true; });
  });
})();
