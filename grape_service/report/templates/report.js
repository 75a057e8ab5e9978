"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = window.matchMedia("(max-width: 720px)").matches;
  const draw = (div) => {
    const figure = figures[div.dataset.figure];
    if (narrow) figure.layout.font.size = 11;
    return Plotly.newPlot(div, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  };
  // The library is packed, and unpacked when there is already something to read.
  const library = async () => {
    const packed = document.getElementById("plotly").textContent;
    const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(packed) : Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const pause = () => new Promise((done) => setTimeout(done, 0));
  const painted = () =>
    new Promise((done) => {
      new PerformanceObserver(done).observe({ type: "paint", buffered: true });
      setTimeout(done, 500);
    });
  // One plot at a time, the nearest to what is in view first, so that the page can be read and scrolled from the start.
  window.plotsDrawn = (async () => {
    await painted();
    await library();
    const left = [...document.querySelectorAll(".plot")];
    while (left.length) {
      const distances = new Map(left.map((div) => [div, Math.abs(div.getBoundingClientRect().top - innerHeight / 2)]));
      left.sort((a, b) => distances.get(a) - distances.get(b));
      await draw(left.shift());
      await pause();
    }
  })();

  // Paper is narrower than most windows: plots are drawn again at its width, and back after it.
  const PAPER = 680;
  const redraw = (width) => {
    for (const div of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(div, { width: width && Math.min(width, PAPER), autosize: !width });
  };
  addEventListener("beforeprint", () => redraw(PAPER));
  addEventListener("afterprint", () => redraw(undefined));

  const names = ["log-probability", "ratio", "weight"];
  const scales = [
    "the darker, the less probable under the target; full colour at -5.5 and below",
    "orange: less probable under the target than under its behavior policy; blue: more probable; full colour beyond -1.1 and 1.1; only kept rows have ratios",
    "orange: weighs less than 1; blue: more; full colour at a third and at three times; only kept rows have weights",
  ];
  const readout = document.getElementById("readout");
  if (!readout) return;
  const shade = (mode, value) => {
    if (value === undefined) return "";
    const v = Number(value);
    if (mode === 0) return `rgba(217,105,43,${Math.min(0.55, -v / 10).toFixed(3)})`;
    const signed = mode === 1 ? v : Math.log(Math.max(v, 1e-5));
    const strength = Math.min(0.55, Math.abs(signed) / 2);
    return signed < 0 ? `rgba(217,105,43,${strength.toFixed(3)})` : `rgba(61,125,202,${strength.toFixed(3)})`;
  };
  const paint = (mode) => {
    document.getElementById("scale").textContent = scales[mode];
    for (const token of document.querySelectorAll(".tokens span")) token.style.background = shade(mode, token.dataset[mode]);
  };
  const tell = (token) => {
    const parts = names.map((name, i) => (token.dataset[i] === undefined ? null : `${name} ${token.dataset[i]}`)).filter(Boolean);
    readout.textContent = `“${token.textContent}”: ${parts.join(", ") || "no numbers"}`;
  };
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", () => paint(Number(radio.value)));
  for (const box of document.querySelectorAll(".tokens")) {
    let at = -1;
    const move = (place) => {
      const tokens = box.children;
      if (!tokens.length) return;
      if (at >= 0) tokens[at].classList.remove("at");
      at = Math.max(0, Math.min(tokens.length - 1, place));
      tokens[at].classList.add("at");
      tokens[at].scrollIntoView({ block: "nearest", inline: "nearest" });
      tell(tokens[at]);
    };
    box.addEventListener("mouseover", (event) => { if (event.target !== box) tell(event.target); });
    box.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        move(at + (event.key === "ArrowRight" ? 1 : -1));
        event.preventDefault();
      }
    });
  }
  const checked = document.querySelector("input[name=mode]:checked");
  if (checked) paint(Number(checked.value));
})();
